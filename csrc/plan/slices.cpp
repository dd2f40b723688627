#include "slices.h"

#include <algorithm>
#include <iterator>

#include "fusion.h"

namespace {

bool touches(const Step& step, int32_t id) {
  const int32_t ids[] = {step.in, step.in2, step.out, step.aux[0], step.aux[1], step.aux[2], step.aux[3]};
  return std::find(std::begin(ids), std::end(ids), id) != std::end(ids);
}

bool overlap(const Value& a, const Value& b) {
  const auto end = [](const Value& v) { return v.offset + int64_t{v.height} * v.width * v.stride * element_bytes(v.dtype); };
  return a.external < 0 && b.external < 0 && a.offset < end(b) && b.offset < end(a);
}

// Nobody else looks at the value, and until it is read nobody at its memory.
bool is_private(const Plan& plan, int32_t writer, int32_t reader) {
  const int32_t id = plan.steps[writer].out;
  const Value& value = plan.values[id];
  if (value.external >= 0 || value.first != 0 || value.stride != value.channels) return false;
  for (int32_t i = 0; i < static_cast<int32_t>(plan.steps.size()); ++i) {
    const Step& step = plan.steps[i];
    if (i != writer && i != reader && touches(step, id)) return false;
    for (int32_t other = 0; i > writer && i <= reader && other < static_cast<int32_t>(plan.values.size()); ++other)
      if (other != id && touches(step, other) && overlap(value, plan.values[other])) return false;
  }
  const Step& last = plan.steps[reader];
  return last.in == id && last.in2 != id && last.out != id && last.grid < 0;
}

// The small plans that other steps make of themselves have none.
int32_t partner_of(const Run& run, int32_t index) { return run.plan.partners.empty() ? -1 : run.plan.partners[index]; }

bool sliced(const Run& run, int32_t writer, int32_t reader, int threads) {
  return writer >= run.first && reader < run.last && inverted_by_channels(run.plan, run.plan.steps[writer], run.call.images, threads) &&
         cut_by_channels(run.plan, run.plan.steps[reader], run.call.images, threads);
}

}  // namespace

std::vector<int32_t> partners_of(const Plan& plan) {
  std::vector<int32_t> partners(plan.steps.size(), -1);
  const auto count = static_cast<int32_t>(plan.steps.size());
  for (int32_t writer = 0; writer < count; ++writer) {
    const Step& step = plan.steps[writer];
    if (step.kind != kInverted || (step.conv[2] >= 0 && !step.ints[0])) continue;
    int32_t reader = writer + 1;
    while (reader < count && !touches(plan.steps[reader], step.out)) ++reader;
    if (reader == count || plan.steps[reader].kind != kChannelFusion || !is_private(plan, writer, reader)) continue;
    partners[writer] = reader;
    partners[reader] = writer;
  }
  return partners;
}

bool writes_slices(const Run& run, int32_t index, int threads) {
  const int32_t reader = partner_of(run, index);
  return reader > index && sliced(run, index, reader, threads);
}

bool reads_slices(const Run& run, int32_t index, int threads) {
  const int32_t writer = partner_of(run, index);
  return writer >= 0 && writer < index && sliced(run, writer, index, threads);
}
