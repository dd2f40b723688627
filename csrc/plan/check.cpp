// What can be said against a plan before it runs: every index, size and pointer that a step will use.

#include <algorithm>
#include <cstdint>
#include <string>

#include "../kernels/inverted_residual.h"
#include "../kernels/isa.h"
#include "run.h"

namespace {

constexpr int64_t kMostTaps = 512;
constexpr int64_t kMostElements = int64_t{1} << 40;
constexpr int32_t kMostChannels = 1 << 24;
constexpr int32_t kMostHidden = 1 << 20;  // of a router, whose layers lie in a thread's scratch

struct Checker {
  const PlanData& data;
  std::string reason;

  bool fail(const std::string& text) {
    if (reason.empty()) reason = text;
    return false;
  }
  bool value(int32_t id, const char* what) {
    return (id >= 0 && id < data.value_count) || fail(std::string(what) + " names no value");
  }
  bool conv(int32_t id) { return (id >= 0 && id < data.conv_count) || fail("a step names no convolution"); }
  bool grid(int32_t id) { return (id >= 0 && id < data.grid_count) || fail("a step names no grid"); }
  const Value& at(int32_t id) const { return data.values[id]; }

  bool same_grid(const Value& a, const Value& b) {
    return (a.height == b.height && a.width == b.width) || fail("two values of a step lie on different grids");
  }
  bool lies_on(int32_t id, const Value& v) {
    return grid(id) && ((data.grids[id].height == v.height && data.grids[id].width == v.width) ||
                        fail("a mask lies on another grid than what it masks"));
  }
  // `pools`: ceil_mode may have made the output one larger, with a window that starts inside the padded input.
  bool geometry(const Conv& c, int32_t in_h, int32_t in_w, int32_t out_h, int32_t out_w, bool pools = false) {
    const int32_t in[2] = {in_h, in_w}, out[2] = {out_h, out_w};
    for (int i = 0; i < 2; ++i) {
      if (c.kernel[i] < 1 || c.stride[i] < 1 || c.padding[i] < 0 || c.dilation[i] < 1 || c.kernel[i] > 4096 ||
          c.stride[i] > 4096 || c.padding[i] > 4096 || c.dilation[i] > 4096)
        return fail("a kernel, stride, padding or dilation is out of range");
      const int64_t reach = int64_t{c.dilation[i]} * (c.kernel[i] - 1) + 1;
      const int64_t room = int64_t{in[i]} + 2 * c.padding[i];
      if (room < reach) return fail("a kernel is larger than its padded input");
      const int64_t size = (room - reach) / c.stride[i] + 1;
      const bool ceiled = pools && out[i] == size + 1 && size * c.stride[i] < int64_t{in[i]} + c.padding[i];
      if (out[i] != size && !ceiled) return fail("an output size does not follow from kernel, stride and padding");
      if (pools && 2 * c.padding[i] > reach) return fail("a pooling pads by more than half of its kernel");
    }
    return int64_t{c.kernel[0]} * c.kernel[1] <= kMostTaps || fail("a kernel has too many taps");
  }
  bool weights(const Conv& c, bool winograd_alone = false) {
    if (!c.bias || !(c.weight || (winograd_alone && c.winograd))) return fail("a convolution has no weight or no bias");
    if (c.groups < 1 || c.in_channels < 1 || c.out_channels < 1 || c.in_channels > kMostChannels ||
        c.out_channels > kMostChannels || c.in_channels % c.groups || c.out_channels % c.groups)
      return fail("channels of a convolution are not divisible into its groups");
    return true;
  }
  bool convolution(const Step& s, int32_t id, const Value& in, const Value& out) {
    if (!conv(id)) return false;
    const Conv& c = data.convs[id];
    // Weights for Winograd alone serve where every row is computed.
    return weights(c, s.kind == kConv && s.grid < 0) &&
           (c.in_channels == in.channels || fail("an input has other channels than its convolution")) &&
           (c.out_channels == out.channels || fail("an output has other channels than its convolution")) &&
           geometry(c, in.height, in.width, out.height, out.width) && masked(s, out);
  }
  bool masked(const Step& s, const Value& out) {
    if (s.grid < 0) return (s.grid == -1 || fail("a grid is out of range")) && no_closed(s);
    if (!lies_on(s.grid, out)) return false;
    // A stem looks at the mask itself.
    return !s.closed || s.kind == kStem || data.grids[s.grid].closed || fail("a step walks closed rows that nobody lists");
  }
  bool residual(const Step& s, const Value& out) {
    if (s.in2 == -1) return true;
    const Value& add = at(s.in2);
    return same_grid(add, out) && (add.channels == out.channels || fail("a shortcut has other channels than its branch")) &&
           (add.dtype == out.dtype || fail("a shortcut has another dtype than its branch"));
  }
  bool activations(const Step& s) {
    for (const int32_t a : {s.activation[0], s.activation[1], s.activation[2], s.final_activation})
      if (a < 0 || kind_of(a) >= kActivations || (a != kind_of(a) && kind_of(a) != kLeakyRelu)) return fail("an activation is unknown");
    return true;
  }
  bool float_value(int32_t id, const char* what) {
    return value(id, what) && (at(id).dtype == kFloat32 || fail(std::string(what) + " must be float32"));
  }
  bool pointwise(const Conv& c) {
    for (int i = 0; i < 2; ++i)
      if (c.kernel[i] != 1 || c.stride[i] != 1 || c.padding[i] != 0 || c.dilation[i] != 1)
        return fail("an expansion or projection is not 1x1");
    return true;
  }
  bool winograd(const Step& s, const Value& in, const Value& out) {
    return !data.convs[s.conv[0]].winograd || minimal(s, in, out);
  }
  bool minimal(const Step& s, const Value& in, const Value& out) {
    const Conv& c = data.convs[s.conv[0]];
    for (int i = 0; i < 2; ++i)
      if (c.kernel[i] != 3 || c.stride[i] != 1 || c.dilation[i] != 1) return fail("Winograd weights are for 3x3, stride 1");
    if (c.groups != 1 || in.dtype != out.dtype || s.closed)
      return fail("Winograd weights are for one group, one dtype, open rows");
    if (out.height != in.height + 2 * c.padding[0] - 2 || out.width != in.width + 2 * c.padding[1] - 2)
      return fail("an output size does not follow from kernel, stride and padding");
    if (s.grid2 >= 0 && !lies_on(s.grid2, in)) return false;
    return s.grid < 0 || data.grids[s.grid].tiles || fail("a masked Winograd convolution needs the tiles of its grid");
  }
  // Numbers of each image: coefficients, attention.
  bool numbers(int32_t id, int64_t count) {
    if (!value(id, "coefficients")) return false;
    const Value& v = at(id);
    return (v.dtype == kFloat32 && v.height * v.width == 1 && v.channels == count) ||
           fail("coefficients must be float32, on a 1x1 grid, as many as the step needs");
  }
  bool dynamic(const Step& s, const Value& in, const Value& out) {
    if (!convolution(s, s.conv[0], in, out) || !residual(s, out)) return false;
    const Conv& c = data.convs[s.conv[0]];
    if (in.dtype != kFloat32 || out.dtype != kFloat32) return fail("experts are mixed in float32");
    if (s.ints[0] < 1 || s.ints[0] > 4096) return fail("the number of experts is out of range");
    if (s.conv[1] >= 0) {
      const Conv& biases = data.convs[s.conv[1]];
      if (!biases.weight) return fail("biases to mix are missing");
      if (biases.in_channels != c.in_channels || biases.out_channels != c.out_channels || biases.groups != c.groups)
        return fail("biases to mix have other channels than their experts");
    }
    const bool depthwise = c.groups > 1 && c.groups == c.in_channels && c.groups == c.out_channels;
    if (depthwise && s.aux[2] >= 0) return fail("a depthwise kernel's channels are scaled as outputs");
    const bool alone = s.aux[0] == -1 && s.ints[0] == 1;
    return (alone || numbers(s.aux[0], int64_t{s.ints[0]} * (s.ints[1] ? c.out_channels : 1))) &&
           (s.aux[1] < 0 || numbers(s.aux[1], int64_t{c.kernel[0]} * c.kernel[1])) &&
           (s.aux[2] < 0 || numbers(s.aux[2], c.in_channels)) && (s.aux[3] < 0 || numbers(s.aux[3], c.out_channels)) &&
           (!depthwise || no_closed(s)) && (!s.ints[2] || minimal(s, in, out));
  }
  bool fusion(const Step& s, const Value& in, const Value& out) {
    if (!convolution(s, s.conv[0], in, out) || !residual(s, out)) return false;
    const Conv& c = data.convs[s.conv[0]];
    if (in.dtype != kFloat32 || out.dtype != kFloat32) return fail("channel fusion runs in float32");
    if (s.ints[3] < 0 || s.ints[3] > 1) return fail("a channel fusion has two forms");
    if (c.groups > 1 && (s.ints[3] == 0 || c.groups == c.in_channels)) return fail("a low-rank part does not fold into groups");
    return fusion_parts(s, in.channels, out.channels) && s.aux[1] == -1 && no_closed(s) && (!s.ints[2] || minimal(s, in, out));
  }
  // The static weight, Q and P of a channel fusion.
  bool fusion_parts(const Step& s, int32_t inputs, int32_t outputs) {
    if (!conv(s.conv[0]) || !conv(s.conv[1]) || !conv(s.conv[2])) return false;
    const Conv &reduce = data.convs[s.conv[1]], &expand = data.convs[s.conv[2]];
    if (!reduce.weight || !reduce.bias || !expand.weight || !expand.bias) return fail("a projection has no weight or no bias");
    if (!pointwise(reduce) || !pointwise(expand)) return false;
    if (reduce.groups != 1 || expand.groups != 1) return fail("a projection has one group");
    if (reduce.in_channels != inputs || expand.out_channels != outputs || reduce.out_channels < 1 ||
        reduce.out_channels > 4096 || expand.in_channels != reduce.out_channels)
      return fail("the projections of a channel fusion do not fit");
    if (s.ints[0] != 1 || s.ints[1] != 1) return fail("a channel fusion has one weight");
    return numbers(s.aux[0], int64_t{outputs} + int64_t{reduce.out_channels} * reduce.out_channels) && s.aux[2] == -1 &&
           s.aux[3] == -1;
  }
  bool factors(const Step& s) {
    if (!conv(s.conv[1]) || !value(s.out, "factors") || !value(s.aux[0], "coefficients")) return false;
    const Conv& reduce = data.convs[s.conv[1]];
    if (!weights(reduce) || reduce.groups != 1 || !pointwise(reduce) || reduce.out_channels > 4096)
      return fail("the factors of a channel fusion need its 1x1 projection");
    const int64_t rank = reduce.out_channels, outputs = at(s.aux[0]).channels - rank * rank;
    if (s.in != -1 && (!float_value(s.in, "in") || at(s.in).channels != reduce.in_channels))
      return fail("the projection of a channel fusion does not fit its input");
    const int64_t rows = s.in == -1 ? 1 + int64_t{reduce.in_channels} : int64_t{at(s.in).height} * at(s.in).width;
    if (outputs < 1 || s.aux[1] != -1 || s.aux[2] != -1 || s.aux[3] != -1)
      return fail("the factors of a channel fusion follow from its coefficients alone");
    return numbers(s.aux[0], outputs + rank * rank) && numbers(s.out, fusion_floats(outputs, rank, rows)) && no_mask(s) &&
           no_second(s);
  }
  // One of a router's layers, from `inputs` channels in all on a grid of its own size.
  bool layer(const Conv& c, const Value& in, int32_t inputs) {
    if (!weights(c) || c.groups != 1 || c.in_channels != inputs || c.out_channels > kMostHidden || c.kernel[0] != in.height ||
        c.kernel[1] != in.width || c.padding[0] || c.padding[1])
      return fail("the layers of a router do not fit");
    return geometry(c, in.height, in.width, 1, 1);
  }
  bool router(const Step& s, const Value& in) {
    if (!conv(s.conv[0]) || !conv(s.conv[2])) return false;
    const Conv& squeeze = data.convs[s.conv[0]];
    const Value one{0, 1, 1, 1, 1, kFloat32, -1, 0, 0};
    if (!float_value(s.in, "in") || !float_value(s.out, "out") || !layer(squeeze, in, in.channels) ||
        !layer(data.convs[s.conv[2]], one, squeeze.out_channels))
      return false;
    if (s.conv[1] >= 0 && (!layer(data.convs[s.conv[1]], one, squeeze.out_channels) ||
                           data.convs[s.conv[1]].out_channels != squeeze.out_channels))
      return fail("the gate of a router has other channels than what it scales");
    return numbers(s.out, data.convs[s.conv[2]].out_channels) && no_mask(s) && no_second(s);
  }
  // The expansion of an inverted residual: static, or a channel fusion.
  bool expansion(const Step& s, const Conv& expand) {
    if (!weights(expand) || !pointwise(expand) || expand.groups != 1) return fail("the expansion does not fit its block");
    if (!s.ints[0]) return s.aux[0] == -1 || fail("an inverted residual takes other values than it has");
    if (!conv(s.conv[2])) return false;
    const Conv& add = data.convs[s.conv[2]];
    if (!weights(add) || !pointwise(add) || add.groups != 1 || add.out_channels != expand.out_channels || add.in_channels > 4096)
      return fail("what is folded into an expansion does not fit it");
    const Value& in = at(s.in);
    const int64_t rows = s.ints[0] == 1 ? 1 + int64_t{expand.in_channels} : int64_t{in.height} * in.width;
    return numbers(s.aux[0], fusion_floats(expand.out_channels, add.in_channels, rows));
  }
  bool masked_inverted(const Step& s, const Value& in, const Value& out) {
    // Without an expansion nobody has to know which rows of the input are read.
    if (s.grid >= 0 && (s.conv[0] >= 0 || s.grid2 >= 0) && (s.grid2 < 0 || !lies_on(s.grid2, in)))
      return fail("a masked inverted residual needs both grids");
    if (s.ints[1] < 0 || s.ints[1] > 2 || (s.ints[1] && (s.in2 < 0 || s.grid < 0))) return fail("closed rows become what is added to open ones");
    return masked(s, out);
  }
  bool unprojected(const Step& s, const Conv& depthwise) {
    const Value &in = at(s.in), &out = at(s.out);
    if (!weights(depthwise) || depthwise.groups != depthwise.in_channels || depthwise.in_channels != depthwise.out_channels ||
        depthwise.out_channels != out.channels)
      return fail("the middle of an inverted residual must be depthwise");
    if (s.conv[0] < 0 || in.dtype != kFloat32 || out.dtype != kFloat32 || s.final_activation != kNone)
      return fail("what has no projection is an expansion and a depthwise convolution in float32");
    return no_second(s) && (s.aux[1] < 0 || numbers(s.aux[1], out.channels)) &&
           geometry(depthwise, in.height, in.width, out.height, out.width) && masked_inverted(s, in, out);
  }
  bool inverted(const Step& s) {
    const Value &in = at(s.in), &out = at(s.out);
    if (!conv(s.conv[1])) return false;
    const Conv& depthwise = data.convs[s.conv[1]];
    const bool projects = s.conv[2] >= 0 && !s.ints[0];
    if (s.aux[2] != -1 || s.aux[3] != -1 || s.ints[0] < 0 || s.ints[0] > 2 || (s.conv[0] < 0 && (s.ints[0] || s.aux[0] != -1)) ||
        (s.aux[1] >= 0 && projects))
      return fail("an inverted residual takes other values than it has");
    if (s.conv[0] >= 0) {
      const Conv& expand = data.convs[s.conv[0]];
      if (!expansion(s, expand)) return false;
      if (expand.in_channels != in.channels || expand.out_channels != depthwise.in_channels)
        return fail("the expansion does not fit its block");
    } else if (depthwise.in_channels != in.channels) {
      return fail("the depthwise convolution does not fit its block");
    }
    if (!projects) return unprojected(s, depthwise);
    if (!conv(s.conv[2])) return false;
    const Conv& project = data.convs[s.conv[2]];
    if (!weights(depthwise) || !weights(project) || !pointwise(project)) return false;
    if (depthwise.groups != depthwise.in_channels || depthwise.in_channels != depthwise.out_channels)
      return fail("the middle of an inverted residual must be depthwise");
    if (project.groups != 1 || project.in_channels != depthwise.out_channels || project.out_channels != out.channels)
      return fail("the projection does not fit its block");
    if (!geometry(depthwise, in.height, in.width, out.height, out.width)) return false;
    return masked_inverted(s, in, out) && residual(s, out);
  }
  bool dilation(const Step& s) {
    if (!grid(s.grid) || !grid(s.grid2) || !conv(s.conv[0])) return false;
    const Grid &out = data.grids[s.grid], &in = data.grids[s.grid2];
    return (s.grid != s.grid2 || fail("a grid cannot be dilated into itself")) &&
           geometry(data.convs[s.conv[0]], in.height, in.width, out.height, out.width, true);  // one decision for several
  }
  bool gate(const Step& s) {
    const Value &in = at(s.in), &out = at(s.out);
    if (!conv(s.conv[0])) return false;
    const Conv& c = data.convs[s.conv[0]];
    if (!c.weight || !c.bias || c.in_channels != in.channels || c.groups != 1 || out.channels != 1 ||
        out.dtype != kFloat32 || out.stride != 1)
      return fail("a gate does not fit its input");
    if (s.ints[1] && (!s.ints[0] || c.stride[0] != 1 || c.stride[1] != 1 || int64_t{c.kernel[0]} * c.kernel[1] > 15))
      return fail("a bias for each tap is for squeeze gates of few taps at stride 1");
    if (s.ints[0] && (!float_value(s.aux[0], "a gate's sums") || at(s.aux[0]).height != in.height ||
                      at(s.aux[0]).width != 1 || at(s.aux[0]).stride != 1))
      return fail("a squeeze gate needs room for one sum a line");
    return geometry(c, in.height, in.width, out.height, out.width);
  }
  bool pairwise(const Step& s) {
    if (!value(s.in2, "in2")) return false;
    const Value &a = at(s.in), &b = at(s.in2), &out = at(s.out);
    if (!same_grid(a, out) || a.channels != out.channels) return fail("operands of a sum or product do not fit");
    if (a.dtype != out.dtype || b.dtype != out.dtype) return fail("operands of a sum or product differ in dtype");
    if (s.aux[0] >= 0) {
      const Value& weight = at(s.aux[0]);
      if (s.kind != kAdd || s.ints[0] || s.grid >= 0 || !same_grid(b, out) || b.channels != out.channels)
        return fail("a weighted sum is of two maps of one size, everywhere");
      return lone(weight) && same_grid(weight, out);
    }
    const bool grid_fits = (b.height == out.height && b.width == out.width) || b.height * b.width == 1;
    return (grid_fits && (b.channels == out.channels || b.channels == 1)) || fail("operands of a sum or product do not fit");
  }
  // Decisions about the channels of a 1x1 grid.
  bool of_channels(int32_t id, const Value& v) {
    return id >= 0 && v.height * v.width == 1 && v.channels > 1 && data.grids[id].height == 1 && data.grids[id].width == v.channels;
  }
  bool narrow(const Step& s, const Value& in, const Value& out) {
    if (!grid(s.grid) || !conv(s.conv[0])) return false;
    const Grid& g = data.grids[s.grid];
    const Conv& c = data.convs[s.conv[0]];
    Step plain = s;
    plain.kind = s.ints[0];
    plain.grid = -1;
    if (s.ints[0] == kInverted) {
      plain.ints[0] = 0;
      const bool whole = !s.ints[1] && !s.ints[2] && s.grid2 == -1 && !s.closed && s.conv[0] >= 0 && s.conv[2] >= 0;
      if (!whole || in.dtype != kFloat32 || g.height != 1) return fail("open channels of an inverted residual are its hidden ones");
      return inverted(plain) && same_dtype(in, out) &&
             (data.convs[s.conv[1]].out_channels % g.width == 0 || fail("the groups of a decision about channels do not fit"));
    }
    if ((s.ints[0] != kConv && s.ints[0] != kDepthwise) || g.height != 1 || s.grid2 != -1 || !(s.ints[1] || s.ints[2]) || s.closed)
      return fail("open channels are those of a convolution");
    if (in.dtype != kFloat32 || out.dtype != kFloat32) return fail("open channels are computed in float32");
    if (!convolution(plain, s.conv[0], in, out) || !residual(s, out) || !winograd(plain, in, out)) return false;
    if ((s.ints[1] && in.channels % g.width) || (s.ints[2] && out.channels % g.width) || (s.ints[2] && s.in2 != -1))
      return fail("the groups of a decision about channels do not fit");
    const bool depthwise = c.groups > 1 && c.groups == c.in_channels && c.groups == c.out_channels;
    if (depthwise != (s.ints[0] == kDepthwise) || (c.groups > 1 && !(s.ints[1] && s.ints[2] && c.groups % g.width == 0)))
      return fail("a convolution in groups opens and closes whole ones");
    return !depthwise || !c.winograd || fail("Winograd weights are for one group");
  }
  bool slopes(const Step& s, const Value& in) {
    return conv(s.conv[0]) && ((data.convs[s.conv[0]].bias && data.convs[s.conv[0]].in_channels == in.channels) ||
                               fail("there is not a slope for each channel"));
  }
  bool resampled(const Step& s, const Value& in, const Value& out) {
    if (!conv(s.conv[0]) || !same_dtype(in, out) || !no_mask(s) || !no_second(s)) return false;
    const Conv& c = data.convs[s.conv[0]];
    const int64_t down = c.kernel[0], across = c.kernel[1], lines = std::max(s.ints[0], 1), columns = std::max(s.ints[1], 1);
    if (down < 1 || across < 1 || down > kMostResampled || across > kMostResampled || down * across > kMostResampled)
      return fail("a sum of rows has too many taps");
    if (!c.weight || c.out_channels != out.height * down + out.width * across) return fail("taps are missing");
    if (lines > 4096 || columns > 4096 || out.channels * lines * columns != in.channels || (lines * columns > 1 && down * across > 1))
      return fail("rows beside each other do not fit");
    if (s.ints[2] < 0 || s.ints[3] < 0 || s.ints[2] >= lines || s.ints[3] >= columns) return fail("rows beside each other do not fit");
    const auto* taps = static_cast<const float*>(c.weight);
    for (int64_t i = 0; i < c.out_channels; ++i) {
      const float most = static_cast<float>(i < out.height * down ? in.height : in.width);
      if (!(taps[2 * i] >= -1 && taps[2 * i] < most)) return fail("a tap lies outside of the map");
    }
    return true;
  }
  bool lone(const Value& v) {
    return (v.channels == 1 && v.dtype == kFloat32) || fail("one number a position must be float32");
  }
  bool norm(const Step& s, const Value& in) {
    if (!conv(s.conv[0])) return false;
    const Conv& c = data.convs[s.conv[0]];
    if (!c.weight || !c.bias) return fail("a normalisation has no weight or no bias");
    return c.in_channels == in.channels || fail("a normalisation has other channels than its input");
  }
  // What a step does not look at must not be asked of it.
  bool no_mask(const Step& s) {
    return (s.grid == -1 && s.grid2 == -1 && !s.closed) || fail("a step of this kind computes every row");
  }
  bool no_second(const Step& s) { return s.in2 == -1 || fail("a step of this kind has one operand"); }
  bool no_closed(const Step& s) { return !s.closed || fail("a step of this kind walks no closed rows"); }
  bool rows_like(const Step& s) {
    const Value &in = at(s.in), &out = at(s.out);
    return same_grid(in, out) && (in.channels == out.channels || fail("a step changes the number of channels"));
  }

  bool in_range(int32_t id, int32_t count) { return (id >= -1 && id < count) || fail("an index is out of range"); }
  bool indices(const Step& s) {
    for (const int32_t id : {s.in, s.in2, s.out, s.aux[0], s.aux[1], s.aux[2], s.aux[3]})
      if (!in_range(id, data.value_count)) return false;
    for (const int32_t id : s.conv)
      if (!in_range(id, data.conv_count)) return false;
    return in_range(s.grid, data.grid_count) && in_range(s.grid2, data.grid_count);
  }

  bool step(const Step& s) {
    if (s.kind < 0 || s.kind >= kKinds) return fail("a step is of an unknown kind");
    if (!indices(s) || !activations(s)) return false;
    if (s.kind == kDilate) return dilation(s);
    if (s.kind == kFusionFactors) return factors(s);
    if (s.kind == kMaskValue)
      return value(s.out, "out") && float_value(s.out, "a mask's value") &&
             (of_channels(s.grid, at(s.out)) ||
              (lies_on(s.grid, at(s.out)) && (at(s.out).stride == 1 || fail("a mask's value has one channel"))));
    if (!value(s.in, "in")) return false;
    const Value& in = at(s.in);
    if (s.kind == kThreshold)
      if (of_channels(s.grid, in)) return float_value(s.in, "logits") && (s.grid2 < 0 || fail("channels lie within no other mask"));
    if (s.kind == kThreshold)
      return lies_on(s.grid, in) && float_value(s.in, "logits") && (in.stride == 1 || fail("logits have one channel")) &&
             (s.grid2 < 0 || (lies_on(s.grid2, in) && (s.grid2 != s.grid || fail("a mask cannot lie within itself"))));
    if (!value(s.out, "out")) return false;
    const Value& out = at(s.out);
    switch (s.kind) {
      case kLayout:
        return rows_like(s) && no_mask(s) && no_second(s) && (in.external >= 0 || fail("only external tensors are laid out")) &&
               float_value(s.in, "a picture");
      case kConv: return convolution(s, s.conv[0], in, out) && residual(s, out) && rounds(in, out) && winograd(s, in, out);
      case kStem: return stem(s, in, out);
      case kDepthwise:
        return convolution(s, s.conv[0], in, out) && residual(s, out) && same_dtype(in, out) &&
               ((data.convs[s.conv[0]].groups == in.channels && in.channels == out.channels) ||
                fail("a depthwise convolution has a group a channel"));
      case kInverted: return inverted(s) && same_dtype(in, out) && no_closed(s);
      case kMaxPool: case kAvgPool:
        return conv(s.conv[0]) && geometry(data.convs[s.conv[0]], in.height, in.width, out.height, out.width, true) &&
               (in.channels == out.channels || fail("pooling keeps the channels")) && same_dtype(in, out) && no_mask(s) &&
               no_second(s);
      case kMean:
        return (in.channels == out.channels || fail("a mean keeps the channels")) && no_second(s) && no_closed(s) &&
               (s.grid < 0 || lies_on(s.grid, in));
      case kAdd: case kMultiply: return pairwise(s) && masked(s, out) && no_closed(s);
      case kActivate:
        if (s.ints[0] < 0 || s.ints[0] > 2) return fail("an activation has an unknown form");
        if (s.ints[0] == 1 && !(lone(in) && lone(out) && no_mask(s))) return false;
        if (s.ints[0] == 2 && !(slopes(s, in) && same_dtype(in, out))) return false;
        return rows_like(s) && no_second(s) && masked(s, out);
      case kGate: return gate(s) && no_mask(s) && no_second(s);
      case kLayerNorm: return rows_like(s) && same_dtype(in, out) && norm(s, in) && masked(s, out) && no_closed(s) && no_second(s);
      case kSoftmax:
        return rows_like(s) && float_value(s.in, "in") && float_value(s.out, "out") && no_mask(s) && no_second(s) &&
               ((s.ints[0] > 0 && out.channels % s.ints[0] == 0) || fail("softmax groups do not divide the channels"));
      case kCopy:
        return same_grid(in, out) && same_dtype(in, out) && no_mask(s) && no_second(s) &&
               ((s.ints[0] >= 0 && s.ints[1] >= 0 && s.ints[0] < out.channels && s.ints[1] < in.channels) ||
                fail("a copy starts outside of the channels")) &&
               ((s.ints[2] >= 0 && s.ints[3] >= 0) || fail("a copy goes back"));
      case kResample: return resampled(s, in, out);
      case kNarrow: return narrow(s, in, out);
      case kDynamicConv: return dynamic(s, in, out);
      case kChannelFusion: return fusion(s, in, out);
      case kRouter: return router(s, in);
      default: return fail("a step is of an unknown kind");
    }
  }
  bool stem(const Step& s, const Value& in, const Value& out) {
    if (!convolution(s, s.conv[0], in, out) || !no_second(s) || !float_value(s.in, "a picture")) return false;
    const Conv& c = data.convs[s.conv[0]];
    if (in.external < 0) return fail("a stem reads an external tensor");
    if (c.groups != 1 || c.dilation[1] != 1) return fail("a stem has one group and no dilation along its lines");
    return s.final_activation == kNone || fail("a stem has one activation");
  }
  // bfloat16 convolutions sum in float32 and may leave it at that.
  bool rounds(const Value& in, const Value& out) { return in.dtype == kBfloat16 || same_dtype(in, out); }
  bool same_dtype(const Value& a, const Value& b) { return a.dtype == b.dtype || fail("a step changes the dtype"); }

  bool tables() {
    if (data.abi != kPlanAbi) return fail("the plan is for another version of the kernels");
    if (data.value_count < 0 || data.conv_count < 0 || data.grid_count < 0 || data.step_count < 0 ||
        data.external_count < 0 || data.arena_bytes < 0)
      return fail("a count is negative");
    if ((data.value_count && !data.values) || (data.conv_count && !data.convs) || (data.grid_count && !data.grids) ||
        (data.step_count && !data.steps))
      return fail("a table is missing");
    if (data.arena_bytes > kMostElements) return fail("the arena is too large");
    for (int32_t i = 0; i < data.value_count; ++i) {
      const Value& v = at(i);
      if (v.height < 1 || v.width < 1 || v.channels < 1 || v.first < 0 || v.stride > kMostChannels ||
          int64_t{v.first} + v.channels > v.stride || v.height > 32767 || v.width > 32767)
        return fail("a value has an impossible shape");
      if (v.dtype != kFloat32 && v.dtype != kBfloat16) return fail("a value has an unknown dtype");
      if (v.dtype == kBfloat16 && !has_bfloat16()) return fail("this processor cannot multiply bfloat16 (no AVX512_BF16)");
      const int64_t elements = int64_t{v.height} * v.width * v.stride;
      if (elements > kMostElements) return fail("a value is too large");
      if (v.external < -1 || v.external >= data.external_count) return fail("a value names no external tensor");
      if (v.external >= 0 && v.first != 0) return fail("an external tensor's channels begin at its rows");
      if (v.external == -1 && (v.offset < 0 || v.offset % 4 || v.offset > data.arena_bytes ||
                               v.offset + elements * element_bytes(v.dtype) > data.arena_bytes))
        return fail("a value lies outside the arena");
    }
    for (int32_t i = 0; i < data.grid_count; ++i)
      if (data.grids[i].height < 1 || data.grids[i].width < 1 || data.grids[i].height > 32767 || data.grids[i].width > 32767)
        return fail("a grid has an impossible shape");
    return true;
  }
};

}  // namespace

std::string check_plan(const PlanData& data) {
  Checker checker{data, ""};
  if (!checker.tables()) return checker.reason;
  for (int32_t i = 0; i < data.step_count; ++i)
    if (!checker.step(data.steps[i]))
      return "step " + std::to_string(i) + ": " + (checker.reason.empty() ? "impossible" : checker.reason);
  return check_use(data);
}
