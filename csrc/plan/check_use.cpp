// What can be said against the order of the steps: whose memory a result may take, and which mask is decided before it is
// used.

#include <initializer_list>
#include <string>
#include <vector>

#include "run.h"

namespace {

// Operands whose place the result of a step may take, since every element is read before it is written by whoever does so.
bool may_replace(const Step& step, int32_t id) {
  switch (step.kind) {
    case kConv: case kDepthwise: case kInverted: case kDynamicConv: case kChannelFusion: case kNarrow:
      return id == step.in2 && id != step.in;
    case kAdd: case kMultiply: return id == step.in || id == step.in2;
    case kActivate: case kLayerNorm: case kSoftmax: return id == step.in;
    default: return false;
  }
}

bool same_rows(const Value& a, const Value& b) {
  return a.offset == b.offset && a.height == b.height && a.width == b.width && a.stride == b.stride && a.dtype == b.dtype;
}

bool overlap(const Value& a, const Value& b) {
  if (a.external >= 0 || b.external >= 0) return a.external == b.external;
  if (same_rows(a, b)) return a.first < b.first + b.channels && b.first < a.first + a.channels;
  const auto end = [](const Value& v) {
    return v.offset + int64_t{v.height} * v.width * v.stride * element_bytes(v.dtype);
  };
  return a.offset < end(b) && b.offset < end(a);
}

bool same_place(const Value& a, const Value& b) {
  return a.external == b.external && same_rows(a, b) && a.first == b.first && a.channels == b.channels;
}

// Further values that a step writes, -1: none. All others are operands.
int32_t second_result(const Step& step) {
  if (step.kind == kGate) return step.aux[0];
  return step.kind == kInverted ? step.aux[1] : -1;
}

const char* aliases(const PlanData& data, const Step& step) {
  const Value* values = data.values;
  const int32_t second = second_result(step);
  for (const int32_t in : {step.in, step.in2, step.aux[0], step.aux[1], step.aux[2], step.aux[3]}) {
    if (in < 0) continue;
    const bool operand = in == step.in || in == step.in2 || in != second;
    if (operand && second >= 0 && overlap(values[in], values[second])) return "a second result overlaps an operand";
    if (!operand || step.out < 0 || !overlap(values[in], values[step.out])) continue;
    if (!may_replace(step, in) || !same_place(values[in], values[step.out])) return "a result overlaps an operand";
  }
  if (second >= 0 && overlap(values[step.out], values[second])) return "two results of a step overlap";
  return nullptr;
}

const char* masks(const Step& step, std::vector<bool>& decided) {
  const bool decides = step.kind == kThreshold, dilates = step.kind == kDilate;
  if (step.grid >= 0 && !decides && !decided[step.grid]) return "a mask is used before it is decided";
  if (step.grid2 >= 0 && !dilates && !decided[step.grid2]) return "a mask is used before it is decided";
  if (decides) decided[step.grid] = true;
  if (dilates) decided[step.grid2] = true;
  return nullptr;
}

}  // namespace

std::string check_use(const PlanData& data) {
  std::vector<bool> decided(data.grid_count), taken(data.external_count);
  for (int32_t i = 0; i < data.value_count; ++i) {
    const int32_t external = data.values[i].external;
    if (external < 0) continue;
    if (taken[external]) return "two values are the same external tensor";
    taken[external] = true;
  }
  for (int32_t i = 0; i < data.step_count; ++i) {
    const char* reason = aliases(data, data.steps[i]);
    if (!reason) reason = masks(data.steps[i], decided);
    if (reason) return "step " + std::to_string(i) + ": " + reason;
  }
  return "";
}
