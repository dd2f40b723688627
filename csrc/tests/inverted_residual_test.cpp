// Depthwise convolution and fused inverted residual against plain loops. Runs itself once for each instruction set.
// Buffers are exactly as long as promised, so that the address sanitizer sees every read and write beyond.

#include "../kernels/inverted_residual.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../kernels/activations.h"
#include "../kernels/depthwise.h"
#include "../kernels/gemm.h"
#include "../kernels/isa.h"

namespace {

constexpr float kSentinel = 12345.0f;
int failures = 0;
int64_t compared = 0;

std::mt19937& engine() {
  static std::mt19937 own(7);
  return own;
}

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine()); }

std::vector<float> numbers(int64_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine());
  return values;
}

double reference_activation(double v, int activation) {
  if (std::isnan(v)) return v;
  switch (kind_of(activation)) {
    case kRelu: return std::max(v, 0.0);
    case kRelu6: return std::min(std::max(v, 0.0), 6.0);
    case kSilu: return v / (1 + std::exp(-v));
    case kHardswish: return v * std::min(std::max(v + 3, 0.0), 6.0) / 6;
    case kSigmoid: return 1 / (1 + std::exp(-v));
    case kHardsigmoid: return std::min(std::max(v + 3, 0.0), 6.0) / 6;
    case kGelu: return 0.5 * v * (1 + std::erf(v * M_SQRT1_2));
    case kLeakyRelu: return v < 0 ? v * slope_of(activation) : v;
    case kTanh: return std::tanh(v);
    case kElu: return v < 0 ? std::expm1(v) : v;
    case kMish: return v * std::tanh(std::log1p(std::exp(std::min(v, 500.0))));
    case kGeluTanh: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
    default: return v;
  }
}

struct Problem {
  int64_t images;
  int height, width, channels, hidden, out_channels;
  int kernel[2], stride[2], padding[2], dilation[2];
  bool expand, project, residual, in_place;
  int activation[3], final_activation;
  int mask;       // 0: none, 1: random, 2: empty, 3: full
  int fill;       // closed pixels get the residual (1), with the last activation (2)
  bool run_all;   // without projection: all pixels are computed, the mean is still over open ones
  int threads, band;
  int in_gap, out_gap;  // elements between rows

  int out_size(int axis) const {
    const int size = axis ? width : height;
    return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  std::string text() const {
    char line[400];
    std::snprintf(line, sizeof line,
                  "images %d size %dx%d channels %d hidden %d out %d kernel %dx%d stride %d,%d padding %d,%d dilation %d,%d "
                  "expand %d project %d residual %d act %d %d %d %d mask %d fill %d run all %d threads %d band %d gaps %d %d",
                  static_cast<int>(images), height, width, channels, hidden, out_channels, kernel[0], kernel[1], stride[0],
                  stride[1], padding[0], padding[1], dilation[0], dilation[1], expand, project, residual, activation[0],
                  activation[1], activation[2], final_activation, mask, fill, run_all, threads, band, in_gap, out_gap);
    return line;
  }
};

// What a problem is computed from. `value` is [outputs][depth], row-major, as a person would write it.
struct Data {
  std::vector<float> in, residual, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, zeros;
  std::vector<uint8_t> need, need_hidden;
};

Data make(const Problem& p) {
  Data d;
  const int out_h = p.out_size(0), out_w = p.out_size(1);
  d.in = numbers(p.images * p.height * p.width * (p.channels + p.in_gap), 1);
  d.residual = numbers(p.images * out_h * out_w * (p.out_channels + p.out_gap), 1);
  d.expand = numbers(int64_t{p.hidden} * p.channels, 1 / std::sqrt(static_cast<float>(p.channels)));
  d.expand_bias = numbers(p.hidden, 0.5f);
  d.depthwise = numbers(int64_t{p.kernel[0]} * p.kernel[1] * p.hidden, 1.0f / std::sqrt(static_cast<float>(p.kernel[0] * p.kernel[1])));
  d.depthwise_bias = numbers(p.hidden, 0.5f);
  d.project = numbers(int64_t{p.out_channels} * p.hidden, 1 / std::sqrt(static_cast<float>(p.hidden)));
  d.project_bias = numbers(p.out_channels, 0.5f);
  d.zeros.assign(p.hidden, 0);
  if (p.mask == 0) return d;
  d.need.assign(p.images * out_h * out_w, p.mask == 3);
  const int share = static_cast<int>(draw(5, 95));
  if (p.mask == 1)
    for (uint8_t& open : d.need) open = draw(0, 99) < share;
  d.need_hidden.assign(p.images * p.height * p.width, 0);
  for (int64_t i = 0; i < static_cast<int64_t>(d.need.size()); ++i) {
    if (!d.need[i]) continue;
    for (int ky = 0; ky < p.kernel[0]; ++ky)
      for (int kx = 0; kx < p.kernel[1]; ++kx) {
        const int64_t y = i / out_w % out_h * p.stride[0] - p.padding[0] + ky * p.dilation[0];
        const int64_t x = i % out_w * p.stride[1] - p.padding[1] + kx * p.dilation[1];
        if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
        d.need_hidden[(i / out_w / out_h * p.height + y) * p.width + x] = 1;
      }
  }
  // What no open pixel reads must not matter.
  for (size_t i = 0; i < d.need_hidden.size(); ++i)
    if (!d.need_hidden[i])
      std::fill_n(d.in.begin() + i * (p.channels + p.in_gap), p.channels, std::numeric_limits<float>::quiet_NaN());
  return d;
}

// [outputs][depth] -> panels of 32 outputs, [depth][32] each, zero padded.
std::vector<float> packed(const std::vector<float>& weight, int outputs, int depth) {
  const int panels = (outputs + kPanel - 1) / kPanel;
  std::vector<float> to(int64_t{panels} * depth * kPanel, 0);
  for (int o = 0; o < outputs; ++o)
    for (int k = 0; k < depth; ++k) to[(int64_t{o / kPanel} * depth + k) * kPanel + o % kPanel] = weight[int64_t{o} * depth + k];
  return to;
}

std::vector<float> padded(std::vector<float> bias) {
  bias.resize((bias.size() + kPanel - 1) / kPanel * kPanel, 0);
  return bias;
}

std::vector<double> reference_depthwise(const Problem& p, const Data& d, const std::vector<double>& hidden) {
  const int out_h = p.out_size(0), out_w = p.out_size(1);
  std::vector<double> to(p.images * out_h * out_w * p.hidden);
  for (int64_t i = 0; i < p.images * out_h * out_w; ++i)
    for (int c = 0; c < p.hidden; ++c) {
      double sum = d.depthwise_bias[c];
      for (int ky = 0; ky < p.kernel[0]; ++ky)
        for (int kx = 0; kx < p.kernel[1]; ++kx) {
          const int64_t y = i / out_w % out_h * p.stride[0] - p.padding[0] + ky * p.dilation[0];
          const int64_t x = i % out_w * p.stride[1] - p.padding[1] + kx * p.dilation[1];
          if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
          sum += double{d.depthwise[(ky * p.kernel[1] + kx) * p.hidden + c]} *
                 hidden[((i / out_w / out_h * p.height + y) * p.width + x) * p.hidden + c];
        }
      to[i * p.hidden + c] = reference_activation(sum, p.activation[1]);
    }
  return to;
}

std::vector<double> reference_hidden(const Problem& p, const Data& d) {
  std::vector<double> to(p.images * p.height * p.width * p.hidden);
  for (int64_t i = 0; i < p.images * p.height * p.width; ++i) {
    const float* from = d.in.data() + i * (p.channels + p.in_gap);
    for (int c = 0; c < p.hidden; ++c) {
      double sum = p.expand ? d.expand_bias[c] : from[c];
      if (p.expand)
        for (int k = 0; k < p.channels; ++k) sum += double{d.expand[int64_t{c} * p.channels + k]} * from[k];
      to[i * p.hidden + c] = p.expand ? reference_activation(sum, p.activation[0]) : sum;
    }
  }
  return to;
}

void fail(const Problem& p, const char* what, int64_t at, double got, double wanted) {
  if (++failures < 20) std::printf("%s differs at %lld: %.9g instead of %.9g\n  %s\n", what, static_cast<long long>(at), got, wanted, p.text().c_str());
}

// Open pixels, and closed ones that are filled, have the wanted values, others and the gaps between rows still the sentinel.
void compare(const Problem& p, const Data& d, const char* what, const std::vector<float>& got, const std::vector<double>& wanted,
             int channels, int gap) {
  const int64_t pixels = static_cast<int64_t>(wanted.size()) / channels;
  for (int64_t i = 0; i < pixels; ++i) {
    const bool open = p.mask == 0 || p.fill || d.need[i];
    for (int c = 0; c < channels + gap; ++c) {
      const int64_t at = i * (channels + gap) + c;
      if (at >= static_cast<int64_t>(got.size())) break;
      ++compared;
      if (!open || c >= channels) {
        if (got[at] != kSentinel) fail(p, what, at, got[at], kSentinel);
        continue;
      }
      const double value = wanted[i * channels + c];
      if (!(std::fabs(got[at] - value) <= 2e-5 * (1 + std::fabs(value)))) fail(p, what, at, got[at], value);
    }
  }
}

// The residual waits where the result goes; closed pixels keep the sentinel.
void place(const Problem& p, const Data& d, std::vector<float>& out, int channels) {
  for (size_t i = 0; i < out.size() / (channels + p.out_gap); ++i)
    if (p.mask == 0 || p.fill || d.need[i])
      std::copy_n(d.residual.begin() + i * (channels + p.out_gap), channels, out.begin() + i * (channels + p.out_gap));
}

void check_depthwise(Problem p) {
  p.expand = false;
  p.fill = 0;
  p.channels = p.hidden = p.out_channels;
  const Data d = make(p);
  const int out_h = p.out_size(0), out_w = p.out_size(1);
  std::vector<double> wanted = reference_depthwise(p, d, reference_hidden(p, d));
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (p.residual) wanted[i] += d.residual[i / p.hidden * (p.hidden + p.out_gap) + i % p.hidden];
    wanted[i] = reference_activation(wanted[i], p.final_activation);
  }
  std::vector<float> out(p.images * out_h * out_w * (p.hidden + p.out_gap), kSentinel);
  DepthwiseArgs args{};
  args.images = p.images;
  args.height = p.height;
  args.width = p.width;
  args.out_height = out_h;
  args.out_width = out_w;
  args.channels = p.hidden;
  for (int i = 0; i < 2; ++i) {
    args.kernel[i] = p.kernel[i];
    args.stride[i] = p.stride[i];
    args.padding[i] = p.padding[i];
    args.dilation[i] = p.dilation[i];
  }
  args.in = d.in.data();
  args.in_stride = p.channels + p.in_gap;
  args.weight = d.depthwise.data();
  args.bias = d.depthwise_bias.data();
  args.out = out.data();
  args.out_stride = p.hidden + p.out_gap;
  if (p.in_place) place(p, d, out, p.hidden);
  args.residual = p.in_place ? out.data() : p.residual ? d.residual.data() : nullptr;
  args.residual_stride = p.hidden + p.out_gap;
  args.activation = p.activation[1];
  args.final_activation = p.final_activation;
  args.need = p.mask ? d.need.data() : nullptr;
  args.zeros = d.zeros.data();
  const int64_t chunks = depthwise_chunks(args, p.threads);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) depthwise_run_chunk(args, chunks, chunk);
  compare(p, d, "depthwise", out, wanted, p.hidden, p.out_gap);
}

// What is projected, or the result where nothing is.
std::vector<double> reference_inverted(const Problem& p, const Data& d, const std::vector<double>& middle) {
  if (!p.project) return middle;
  std::vector<double> wanted(middle.size() / p.hidden * p.out_channels);
  for (size_t i = 0; i < wanted.size(); ++i) {
    const int64_t pixel = i / p.out_channels, o = i % p.out_channels;
    double sum = d.project_bias[o];
    for (int c = 0; c < p.hidden; ++c) sum += double{d.project[o * p.hidden + c]} * middle[pixel * p.hidden + c];
    sum = reference_activation(sum, p.activation[2]);
    const double residual = d.residual[pixel * (p.out_channels + p.out_gap) + o];
    if (p.residual) sum += residual;
    const bool closed = p.fill && !d.need[pixel];
    wanted[i] = closed && p.fill == 1 ? residual : reference_activation(closed ? residual : sum, p.final_activation);
  }
  return wanted;
}

// The mean over open pixels, 0 where there is none.
void compare_means(const Problem& p, const Data& d, const std::vector<float>& got, const std::vector<double>& middle) {
  const int64_t area = int64_t{p.out_size(0)} * p.out_size(1), stride = p.hidden + p.out_gap;
  for (int64_t image = 0; image < p.images; ++image)
    for (int c = 0; c < stride; ++c) {
      double sum = 0, count = 0, most = 1;
      for (int64_t i = image * area; i < (image + 1) * area && c < p.hidden; ++i) {
        if (p.mask && !d.need[i]) continue;
        sum += middle[i * p.hidden + c], ++count, most = std::max(most, std::fabs(middle[i * p.hidden + c]));
      }
      const double wanted = c >= p.hidden ? kSentinel : count ? sum / count : 0, value = got[image * stride + c];
      if (++compared, !(std::fabs(value - wanted) <= 2e-5 * most)) fail(p, "mean", image * stride + c, value, wanted);
    }
}

void check_inverted(Problem p) {
  // What is not projected has an expansion and nothing that is added.
  if (!p.project) p.expand = true, p.residual = p.in_place = false, p.out_channels = p.hidden;
  p.run_all = p.run_all && !p.project && p.mask;
  if (!p.residual || !p.mask) p.fill = 0;
  const Data d = make(p);
  const int out_h = p.out_size(0), out_w = p.out_size(1);
  const std::vector<double> middle = reference_depthwise(p, d, reference_hidden(p, d));
  const std::vector<double> wanted = reference_inverted(p, d, middle);
  const auto expand = packed(d.expand, p.hidden, p.channels), project = packed(d.project, p.out_channels, p.hidden);
  const auto expand_bias = padded(d.expand_bias), project_bias = padded(d.project_bias);
  std::vector<float> out(p.images * out_h * out_w * (p.out_channels + p.out_gap), kSentinel);
  InvertedArgs args{};
  args.images = p.images;
  args.height = p.height;
  args.width = p.width;
  args.out_height = out_h;
  args.out_width = out_w;
  args.channels = p.channels;
  args.hidden = p.hidden;
  args.out_channels = p.out_channels;
  for (int i = 0; i < 2; ++i) {
    args.kernel[i] = p.kernel[i];
    args.stride[i] = p.stride[i];
    args.padding[i] = p.padding[i];
    args.dilation[i] = p.dilation[i];
  }
  args.expand_weight = p.expand ? expand.data() : nullptr;
  args.expand_bias = p.expand ? expand_bias.data() : nullptr;
  args.depthwise_weight = d.depthwise.data();
  args.depthwise_bias = d.depthwise_bias.data();
  args.project_weight = p.project ? project.data() : nullptr;
  args.project_bias = p.project ? project_bias.data() : nullptr;
  std::vector<float> means(p.images * (p.hidden + p.out_gap), kSentinel);
  args.means = p.project ? nullptr : means.data();
  args.means_stride = p.hidden + p.out_gap;
  for (int i = 0; i < 3; ++i) args.activation[i] = p.activation[i];
  args.final_activation = p.final_activation;
  args.in = d.in.data();
  args.in_stride = p.channels + p.in_gap;
  args.out = out.data();
  args.out_stride = p.out_channels + p.out_gap;
  args.residual = p.in_place ? out.data() : p.residual ? d.residual.data() : nullptr;
  args.residual_stride = p.out_channels + p.out_gap;
  args.need = p.mask && !p.run_all ? d.need.data() : nullptr;
  args.need_hidden = args.need ? d.need_hidden.data() : nullptr;
  args.fills = p.fill != 0;
  args.closed_activation = p.fill == 2 ? p.final_activation : int{kNone};
  args.counted = p.run_all ? d.need.data() : nullptr;
  args.zeros = d.zeros.data();
  args.threads = p.threads;
  args.band = p.band;
  std::vector<float> first;
  for (int round = 0; round < 2; ++round) {
    // Whatever the scratch held before must not matter.
    const auto block = [](int64_t bytes) {
      void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
      std::memset(memory, 0xff, bytes);
      return memory;
    };
    void* scratch = block(inverted_scratch_bytes(args));
    void* shared = block(inverted_shared_bytes(args));
    args.shared = static_cast<float*>(shared);
    std::fill(out.begin(), out.end(), kSentinel);
    if (p.in_place) place(p, d, out, p.out_channels);
    for (int phase = 0; phase < inverted_phases(args); ++phase)
      for (int64_t chunk = inverted_chunks(args, phase); chunk-- > 0;) inverted_run_chunk(args, phase, chunk, scratch);
    std::free(scratch);
    std::free(shared);
    if (round == 0) first = out;
  }
  if (std::memcmp(first.data(), out.data(), out.size() * sizeof(float)) != 0) fail(p, "a second run", 0, 0, 0);
  if (!p.project) compare_means(p, d, means, middle);
  // Pixels that nobody needs hold anything.
  for (int64_t i = 0; p.run_all && i < p.images * out_h * out_w; ++i)
    if (!d.need[i]) std::fill_n(out.begin() + i * (p.out_channels + p.out_gap), p.out_channels, kSentinel);
  compare(p, d, "inverted residual", out, wanted, p.out_channels, p.out_gap);
}

Problem drawn() {
  Problem p{};
  const int kernels[] = {1, 2, 3, 3, 3, 4, 5, 5, 7, 7, 9};
  const int channels[] = {1, 3, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 72, 96};
  for (;;) {
    p.images = draw(1, 3);
    p.height = static_cast<int>(draw(1, 17));
    p.width = static_cast<int>(draw(1, 23));
    for (int i = 0; i < 2; ++i) {
      p.kernel[i] = kernels[draw(0, 10)];
      p.stride[i] = static_cast<int>(draw(1, draw(0, 4) ? 2 : 3));
      p.dilation[i] = draw(0, 5) ? 1 : 2;
      p.padding[i] = draw(0, 5) ? p.kernel[i] / 2 * p.dilation[i] : static_cast<int>(draw(0, p.kernel[i]));
    }
    if (draw(0, 3)) p.kernel[1] = p.kernel[0], p.stride[1] = p.stride[0], p.padding[1] = p.padding[0], p.dilation[1] = p.dilation[0];
    bool possible = true;
    for (int i = 0; i < 2; ++i)
      possible = possible && (i ? p.width : p.height) + 2 * p.padding[i] > p.dilation[i] * (p.kernel[i] - 1);
    if (possible) break;
  }
  p.expand = draw(0, 3) != 0;
  p.project = draw(0, 2) != 0;
  p.run_all = draw(0, 2) == 0;
  p.fill = static_cast<int>(draw(0, 2));
  p.hidden = draw(0, 3) ? channels[draw(0, 14)] : static_cast<int>(draw(97, 200));
  p.channels = p.expand ? channels[draw(0, 14)] : p.hidden;
  p.out_channels = channels[draw(0, 14)];
  p.residual = draw(0, 1);
  p.in_place = p.residual && draw(0, 1);
  for (int& activation : p.activation) activation = draw(0, 1) ? static_cast<int>(draw(0, 2)) : static_cast<int>(draw(0, kActivations - 1));
  p.final_activation = draw(0, 1) ? 0 : static_cast<int>(draw(0, kActivations - 1));
  p.mask = draw(0, 7) ? static_cast<int>(draw(0, 1)) : static_cast<int>(draw(2, 3));
  p.threads = static_cast<int>(draw(1, 4));
  p.band = draw(0, 2) ? 0 : static_cast<int>(draw(1, 6));
  p.in_gap = draw(0, 2) ? 0 : 16;
  p.out_gap = draw(0, 2) ? 0 : 5;
  return p;
}

// The block shapes of networks, at sizes that a plain loop can do.
void check_known() {
  for (const int size : {1, 2, 7, 14, 15})
    for (const int stride : {1, 2})
      for (const int kernel : {3, 5, 7})
        for (const int mask : {0, 1, 2, 3})
          for (const int threads : {1, 2}) {
            Problem p{};
            p.images = 1;
            p.height = p.width = size;
            p.channels = p.out_channels = 32;
            p.hidden = 192;
            for (int i = 0; i < 2; ++i) p.kernel[i] = kernel, p.stride[i] = stride, p.padding[i] = kernel / 2, p.dilation[i] = 1;
            p.expand = p.project = true;
            p.residual = stride == 1;
            p.activation[0] = p.activation[1] = kernel == 3 ? kRelu6 : kHardswish;
            p.mask = mask;
            p.fill = kernel == 3;
            p.threads = threads;
            check_inverted(p);
            p.project = false;
            check_inverted(p);
          }
}

void check_activations() {
  const float odd[] = {0.0f, -0.0f, 1e-30f, 1e30f, -1e30f, std::numeric_limits<float>::infinity(), -87.5f, 88.5f};
  std::vector<int> activations(kActivations);
  std::iota(activations.begin(), activations.end(), 0);
  for (const int slope : {1, 3355443, (1 << 24) - 1}) activations.push_back(kLeakyRelu + (slope << kSlopeShift));
  for (const int activation : activations) {
    Problem p{};
    p.activation[0] = activation;
    for (int i = -4000; i < 4000; ++i) {
      const float v = i < -3992 ? odd[i + 4000] : i * 0.005f;
      const double wanted = reference_activation(v, activation), got = activate_scalar(v, activation);
      if (!(std::fabs(got - wanted) <= 2e-6 * (1 + std::fabs(wanted))) && got != wanted) fail(p, "activation", i, got, wanted);
    }
    if (!std::isnan(activate_scalar(std::numeric_limits<float>::quiet_NaN(), activation))) fail(p, "NaN", activation, 0, 0);
  }
  for (float v = -86.9f; v < 87.9f; v += 0.0037f)
    if (std::fabs(exponential(broadcast<float4>(v))[0] / std::exp(double{v}) - 1) > 3e-7) fail(Problem{}, "exp", 0, v, 0);
}

}  // namespace

int main(int count, char** words) {
  if (!std::getenv("DYNACONV_ISA")) {
    int bad = 0;
    for (const char* isa : {"plain", "avx2", "avx512"}) {
      setenv("DYNACONV_ISA", isa, 1);
      std::string command = words[0];
      for (int i = 1; i < count; ++i) command += std::string(" ") + words[i];
      bad |= std::system(command.c_str());
    }
    return bad != 0;
  }
  const int rounds = count > 1 ? std::atoi(words[1]) : 300 / std::max(1, std::getenv("DYNACONV_TEST_SHARE") ? std::atoi(std::getenv("DYNACONV_TEST_SHARE")) : 1);
  check_activations();
  check_known();
  for (int i = 0; i < rounds; ++i) check_depthwise(drawn());
  for (int i = 0; i < rounds; ++i) check_inverted(drawn());
  std::printf("%s: %lld values compared, %d differ\n", best_isa(), static_cast<long long>(compared), failures);
  return failures != 0;
}
