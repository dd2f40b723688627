// Convolutions of the channels that a gate opens for each image. Source: the channel mode of LAUDNet, arXiv 2308.15949.
//
// Images that follow each other with the same decision share a convolution: its weights without the closed channels lie
// together in memory of the step, and the ordinary step runs on them. What it writes begins every row with the open
// channels, so that the next one reads them as if there were no others.

#include <algorithm>
#include <cstring>

#include "../kernels/gemm.h"
#include "conv_rows.h"
#include "run.h"

namespace {

// Channels [from, from + count) of some, put behind those before them.
struct Stretch {
  int64_t from, count;
};

// The open ones among `channels` in equal groups; all of them where the decision is not about them.
std::vector<Stretch> stretches(const uint8_t* open, int64_t groups, int64_t channels, bool decided) {
  if (!decided) return {{0, channels}};
  std::vector<Stretch> found;
  const int64_t width = channels / groups;
  for (int64_t g = 0; g < groups; ++g) {
    if (!open[g]) continue;
    if (!found.empty() && found.back().from + found.back().count == g * width) found.back().count += width;
    else found.push_back({g * width, width});
  }
  return found;
}

int64_t total(const std::vector<Stretch>& parts) {
  int64_t count = 0;
  for (const Stretch& part : parts) count += part.count;
  return count;
}

int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

bool is_depthwise(const Conv& conv) {
  return conv.groups > 1 && conv.groups == conv.in_channels && conv.groups == conv.out_channels;
}

// Copies columns of packed rows: `Fixed` is their number where the compiler may know it.
template <int Fixed>
void copy_columns(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * kPanel, from + r * kPanel, (Fixed ? Fixed : columns) * sizeof(float));
}

void copy_columns(const float* from, int64_t rows, int64_t columns, float* to) {
  switch (columns) {
    case 4: return copy_columns<4>(from, rows, columns, to);
    case 8: return copy_columns<8>(from, rows, columns, to);
    case 16: return copy_columns<16>(from, rows, columns, to);
    default: return copy_columns<0>(from, rows, columns, to);
  }
}

// The convolution of the open channels.
class Narrowed {
 public:
  // Sides: whether the decision is about its inputs and about its outputs.
  Narrowed(const Conv& conv, bool ins, bool outs, const uint8_t* open, int64_t groups, bool winograd, char* memory)
      : full_(conv), ins_(stretches(open, groups, conv.in_channels, ins)),
        outs_(stretches(open, groups, conv.out_channels, outs)), inputs_(total(ins_)), outputs_(total(outs_)),
        points_(winograd ? 16 : int64_t{conv.kernel[0]} * conv.kernel[1]),
        source_(static_cast<const float*>(winograd ? conv.winograd : conv.weight)), weight_(reinterpret_cast<float*>(memory)) {
    if (is_depthwise(conv)) weight_floats_ = points_ * outputs_;
    else if (conv.groups > 1) weight_floats_ = outputs_ / per_group() * group_floats();
    else weight_floats_ = panels_of(outputs_) * points_ * inputs_ * kPanel;
    weight_floats_ = (weight_floats_ + 15) / 16 * 16;
    bias_ = weight_ + weight_floats_;
    winograd_ = winograd;
  }
  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }
  Conv conv() const {
    Conv conv = full_;
    conv.in_channels = static_cast<int32_t>(inputs_);
    conv.out_channels = static_cast<int32_t>(outputs_);
    if (conv.groups > 1) conv.groups = static_cast<int32_t>(outputs_ / per_group());
    conv.weight = winograd_ ? nullptr : weight_;
    conv.winograd = winograd_ ? weight_ : nullptr;
    conv.bias = bias_;
    return conv;
  }
  int64_t tasks() const { return is_depthwise(full_) ? 1 : full_.groups > 1 ? outputs_ / per_group() : panels_of(outputs_); }
  void make(int64_t task) const {
    if (is_depthwise(full_)) return make_depthwise();
    if (full_.groups > 1) return make_group(task);
    make_panel(task);
  }

 private:
  int64_t per_group() const { return full_.out_channels / full_.groups; }
  int64_t group_floats() const { return panels_of(per_group()) * points_ * (full_.in_channels / full_.groups) * kPanel; }

  void make_depthwise() const {
    for (int64_t row = 0; row <= points_; ++row) {
      const float* from = row < points_ ? source_ + row * full_.out_channels : full_.bias;
      float* to = row < points_ ? weight_ + row * outputs_ : bias_;
      for (const Stretch& part : outs_) {
        std::memcpy(to, from + part.from, part.count * sizeof(float));
        to += part.count;
      }
    }
  }
  // Whole groups are open or closed.
  void make_group(int64_t task) const {
    int64_t channel = task * per_group(), biases = panels_of(per_group()) * kPanel;
    auto part = outs_.begin();
    for (; channel >= part->count; ++part) channel -= part->count;
    const int64_t group = (part->from + channel) / per_group();
    std::memcpy(weight_ + task * group_floats(), source_ + group * group_floats(), group_floats() * sizeof(float));
    std::memcpy(bias_ + task * biases, full_.bias + group * biases, biases * sizeof(float));
  }
  void make_panel(int64_t panel) const {
    const int64_t rows = points_ * inputs_, all_rows = points_ * full_.in_channels;
    float* const to = weight_ + panel * rows * kPanel;
    if (outputs_ - panel * kPanel < kPanel) {
      std::memset(to, 0, rows * kPanel * sizeof(float));
      std::memset(bias_ + panel * kPanel, 0, kPanel * sizeof(float));
    }
    int64_t skip = panel * kPanel, column = 0;
    for (const Stretch& part : outs_) {
      if (skip >= part.count) {
        skip -= part.count;
        continue;
      }
      for (int64_t at = part.from + skip, end = part.from + part.count; at < end && column < kPanel;) {
        const int64_t columns = std::min({kPanel - at % kPanel, kPanel - column, end - at});
        if (inputs_) take(source_ + at / kPanel * all_rows * kPanel + at % kPanel, columns, to + column);
        std::memcpy(bias_ + panel * kPanel + column, full_.bias + at, columns * sizeof(float));
        at += columns;
        column += columns;
      }
      if (column == kPanel) return;
      skip = 0;
    }
  }
  // Some columns of a panel, in the rows of open inputs.
  void take(const float* from, int64_t columns, float* to) const {
    for (int64_t point = 0; point < points_; ++point, from += full_.in_channels * kPanel) {
      for (const Stretch& part : ins_) {
        if (columns == kPanel) std::memcpy(to, from + part.from * kPanel, part.count * kPanel * sizeof(float));
        else copy_columns(from + part.from * kPanel, part.count, columns, to);
        to += part.count * kPanel;
      }
    }
  }

  const Conv& full_;
  std::vector<Stretch> ins_, outs_;
  int64_t inputs_, outputs_, points_, weight_floats_;
  const float* source_;
  float *weight_, *bias_;
  bool winograd_;
};

// The weights of all channels, and the biases behind them.
int64_t most_floats(const Conv& conv) {
  const int64_t points = conv.winograd ? 16 : int64_t{conv.kernel[0]} * conv.kernel[1];
  const int64_t taps = std::max(points, int64_t{conv.kernel[0]} * conv.kernel[1]), inputs = conv.in_channels / conv.groups;
  if (is_depthwise(conv)) return (taps + 1) * conv.out_channels + 64;
  const int64_t panels = conv.groups * panels_of(conv.out_channels / conv.groups);
  return panels * kPanel * (taps * inputs + 1) + 64;
}

// Tiles cost less than positions, and their weights are more to copy.
bool takes_winograd(const Conv& conv, const Value& out, int64_t images) {
  constexpr double kTile = 20.7, kCopy = 8;  // in products of one tap, for one position
  if (!conv.winograd) return false;
  if (!conv.weight) return true;
  const double tiles = double(images) * ((out.height + 1) / 2) * ((out.width + 1) / 2);
  return tiles * kTile + 16 * kCopy < double(images) * out.height * out.width * 9 + 9 * kCopy;
}

// The convolutions that a step has, as long as they are there.
int count_convs(const Step& step) { return step.ints[0] == kInverted ? 3 : 1; }

// The memory of one of them.
int64_t conv_bytes(const Conv& conv) { return (most_floats(conv) * int64_t{sizeof(float)} + 63) / 64 * 64; }

// The ordinary step on some images, and on what is open of its channels.
void run_inner(Worker& worker, const Step& step, const Plan& plan, const Context& images) {
  Run& run = worker.run;
  Context context{run.context.first + images.first, images.images, {}};
  Call call = run.call;
  call.images = images.images;
  call.step_ns = nullptr;
  // Of this step's counters the first ones belong to the making of weights.
  Run inner{plan, context, call, run.barrier, run.spoilt, run.counters + ((worker.step - run.first) * kPhases + 1) * worker.threads,
            run.arena, nullptr, 0, 1, false, nullptr};
  int64_t used = 0;
  for (int i = 0; i < count_convs(step); ++i) used += conv_bytes(run.conv(step.conv[i]));
  Worker own{inner, worker.id, worker.threads, worker.scratch, worker.shared + used, worker.zeros};
  switch (plan.steps[0].kind) {
    case kDepthwise: return step_depthwise(own, plan.steps[0]);
    case kInverted: return step_inverted(own, plan.steps[0]);
    default: return step_conv(own, plan.steps[0]);
  }
}

// A plan of this step alone: its values with so many channels, and its convolutions.
void plan_inner(Plan& inner, const Plan& plan, const Step& step, std::vector<Conv> convs) {
  Value in = plan.values[step.in], out = plan.values[step.out];
  in.channels = convs.front().in_channels;
  out.channels = convs.back().out_channels;
  inner.values = {in, out};
  Step plain = step;
  plain.kind = step.ints[0];
  plain.ints[0] = 0;
  plain.in = 0;
  plain.out = 1;
  if (step.in2 >= 0) {
    inner.values.push_back(plan.values[step.in2]);
    plain.in2 = 2;
  }
  for (int i = 0; i < count_convs(step); ++i) plain.conv[i] = i;
  if (plain.kind == kInverted && convs[1].out_channels == 0) {
    // Nothing is projected: what remains is the bias.
    plain.kind = kConv;
    plain.conv[0] = 2;
    plain.activation[0] = plain.activation[2];
    inner.values[0].channels = 0;
  }
  plain.grid = plain.grid2 = -1;
  inner.steps = {plain};
  inner.convs = std::move(convs);
}

// The inverted residual with so many hidden channels.
void plan_hidden(Plan& inner, const Plan& plan, const Step& step, int32_t hidden) {
  std::vector<Conv> convs;
  for (const int32_t id : step.conv) convs.push_back(plan.convs[id]);
  convs[0].out_channels = convs[1].in_channels = convs[1].out_channels = convs[1].groups = convs[2].in_channels = hidden;
  plan_inner(inner, plan, step, std::move(convs));
}

// The most that f says of the step with any number of hidden channels.
template <typename F>
int64_t most_of_hidden(const Plan& plan, const Step& step, F&& f) {
  const int32_t groups = plan.grids[step.grid].width, hidden = plan.convs[step.conv[1]].out_channels;
  int64_t most = 0;
  Plan inner;
  for (int32_t open = 1; open <= groups; ++open) {
    plan_hidden(inner, plan, step, hidden / groups * open);
    most = std::max(most, f(inner, inner.steps[0]));
  }
  return most;
}

}  // namespace

int64_t scratch_narrow(const Plan& plan, const Step& step) {
  if (step.ints[0] == kInverted) {
    // Where nothing is open, the projection's bias is left to a convolution.
    const int64_t bias = table_bytes(1);
    return std::max(bias, most_of_hidden(plan, step, [](const Plan& inner, const Step& plain) { return scratch_inverted(inner, plain); }));
  }
  return step.ints[0] == kConv ? std::max(scratch_conv(plan, step), scratch_winograd(plan, step)) : 0;
}

int64_t shared_narrow(const Plan& plan, const Step& step, int64_t images, int threads) {
  int64_t bytes = 0;
  for (int i = 0; i < count_convs(step); ++i) bytes += conv_bytes(plan.convs[step.conv[i]]);
  if (step.ints[0] != kInverted) return bytes;
  // Few images at a time may take another way than many.
  int64_t most = 0;
  for (int64_t some = 1; some <= std::min<int64_t>(images, 2 * threads); ++some)
    most = std::max(most, most_of_hidden(plan, step, [=](const Plan& inner, const Step& plain) {
                      return shared_inverted(inner, plain, some, threads);
                    }));
  return bytes + most;
}

void step_narrow(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const int count = count_convs(step);
  const int64_t groups = run.plan.grids[step.grid].width;
  const uint8_t* const need = run.context.grids[step.grid].need;
  Plan inner;
  for (int64_t image = 0, next; image < run.call.images; image = next) {
    const uint8_t* const open = need + image * groups;
    for (next = image + 1; next < run.call.images && !std::memcmp(open, need + next * groups, groups);) ++next;
    const bool all = std::all_of(open, open + groups, [](uint8_t one) { return one != 0; });
    const bool some = std::any_of(open, open + groups, [](uint8_t one) { return one != 0; });
    if (!some && step.ints[2]) continue;
    std::vector<Conv> convs;
    std::vector<Narrowed> narrowed;
    char* memory = worker.shared;
    int64_t tasks = 0;
    for (int i = 0; i < count; ++i) {
      const Conv& conv = run.conv(step.conv[i]);
      // Of an inverted residual the hidden channels are closed.
      const bool ins = count == 1 ? step.ints[1] != 0 : i > 0, outs = count == 1 ? step.ints[2] != 0 : i < 2;
      const bool winograd = count == 1 && !all && (some || !ins) && takes_winograd(conv, run.value(step.out), next - image);
      narrowed.emplace_back(conv, ins, outs, open, groups, winograd, memory);
      convs.push_back(all ? conv : narrowed.back().conv());
      tasks += narrowed.back().tasks();
      memory += conv_bytes(conv);
    }
    if (!all) {
      worker.share(tasks, [&](int64_t task) {
        auto part = narrowed.begin();
        for (; task >= part->tasks(); ++part) task -= part->tasks();
        part->make(task);
      });
    }
    worker.barrier();
    plan_inner(inner, run.plan, step, std::move(convs));
    run_inner(worker, step, inner, Context{image, next - image, {}});
    worker.barrier();
    if (next == run.call.images) return;
    // The next images begin anew with the same counters and the same memory.
    if (worker.id == 0) {
      std::atomic<int64_t>* const counters = run.counters + (worker.step - run.first) * kPhases * worker.threads;
      for (int64_t i = 0; i < int64_t{kPhases} * worker.threads; ++i) counters[i].store(0, std::memory_order_relaxed);
    }
    worker.phase = 0;
    worker.barrier();
  }
}
