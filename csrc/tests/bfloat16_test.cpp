// Steps in bfloat16 against plain loops in double over the same rounded inputs and weights. A processor that cannot run them
// must refuse the plan and say why.

#include <algorithm>
#include <functional>

#include "../kernels/isa.h"
#include "plan_builder.h"

namespace {

int failures = 0;

std::vector<float> rounded(std::vector<float> values) {
  for (float& v : values) v = from_bfloat16(to_bfloat16(v));
  return values;
}
std::vector<uint16_t> halves(const std::vector<float>& values) {
  std::vector<uint16_t> result(values.size());
  std::transform(values.begin(), values.end(), result.begin(), to_bfloat16);
  return result;
}
std::vector<float> floats(const std::vector<uint16_t>& values) {
  std::vector<float> result(values.size());
  std::transform(values.begin(), values.end(), result.begin(), from_bfloat16);
  return result;
}

double act(double v, int activation) {
  switch (kind_of(activation)) {
    case kRelu: return std::max(v, 0.0);
    case kRelu6: return std::min(std::max(v, 0.0), 6.0);
    case kSilu: return v / (1 + std::exp(-v));
    case kHardswish: return v * std::min(std::max(v + 3, 0.0), 6.0) / 6;
    case kSigmoid: return 1 / (1 + std::exp(-v));
    case kHardsigmoid: return std::min(std::max(v + 3, 0.0), 6.0) / 6;
    case kGelu: return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case kLeakyRelu: return v < 0 ? v * slope_of(activation) : v;
    case kTanh: return std::tanh(v);
    case kElu: return v < 0 ? std::expm1(v) : v;
    case kMish: return v * std::tanh(std::log1p(std::exp(std::min(v, 500.0))));
    case kGeluTanh: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
    default: return v;
  }
}

// Half a unit in the last place of bfloat16 is 2^-9; float sums add what their length says.
void compare(const char* what, const std::vector<float>& got, const std::vector<double>& want, bool float_out, double sums) {
  double scale = 1e-6;
  for (const double w : want) scale = std::max(scale, std::fabs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    const double most = (float_out ? 0 : std::fabs(want[i]) / 250) + 2e-6 * scale * std::sqrt(sums) + 1e-7;
    if (std::fabs(got[i] - want[i]) <= most) continue;
    ++failures;
    std::fprintf(stderr, "%s: %g instead of %g at %zu of %zu\n", what, got[i], want[i], i, want.size());
    return;
  }
  if (got.size() != want.size()) ++failures;
}

void execute(PlanBuilder& b, int n, int threads, const std::vector<void*>& externals, int32_t planes = 0) {
  void* plan = b.create();
  if (!plan) {
    ++failures;
    return;
  }
  void* context = dynaconv_plan_acquire(plan, n);
  std::vector<int32_t> layouts(externals.size());
  layouts[0] = planes;
  Call call{};
  call.images = n, call.threads = threads, call.last = static_cast<int32_t>(b.steps.size());
  call.externals = externals.data(), call.external_planes = layouts.data();
  char error[256] = "";
  if (dynaconv_plan_run(plan, context, &call, error, sizeof error)) std::fprintf(stderr, "%s\n", error), ++failures;
  dynaconv_plan_release(plan, context);
  dynaconv_plan_destroy(plan);
}

struct Case {
  int32_t n, h, w, in, out, groups, kernel, stride, padding, dilation, threads;
  double density;  // < 0: no mask
  bool shortcut, float_out;
  int32_t activation;
};

struct Size {
  int32_t h, w;
};
Size output(const Case& c) {
  const auto size = [&](int32_t in) { return (in + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1; };
  return {size(c.h), size(c.w)};
}

// x [N, h, w, I], weight [O][I / g][k][k] -> [N, oh, ow, O].
std::vector<double> convolve(const Case& c, const std::vector<float>& x, const std::vector<float>& weight,
                             const std::vector<float>& bias) {
  const Size size = output(c);
  const int per = c.in / c.groups, outs = c.out / c.groups;
  std::vector<double> y;
  for (int n = 0; n < c.n; ++n)
    for (int oy = 0; oy < size.h; ++oy)
      for (int ox = 0; ox < size.w; ++ox)
        for (int o = 0; o < c.out; ++o) {
          double sum = bias[o];
          for (int k = 0; k < per; ++k)
            for (int i = 0; i < c.kernel; ++i)
              for (int j = 0; j < c.kernel; ++j) {
                const int yy = oy * c.stride - c.padding + i * c.dilation, xx = ox * c.stride - c.padding + j * c.dilation;
                if (yy < 0 || yy >= c.h || xx < 0 || xx >= c.w) continue;
                sum += double(x[((int64_t{n} * c.h + yy) * c.w + xx) * c.in + o / outs * per + k]) *
                       weight[((int64_t{o} * per + k) * c.kernel + i) * c.kernel + j];
              }
          y.push_back(sum);
        }
  return y;
}

// Which inputs the open outputs read.
std::vector<uint8_t> reads(const Case& c, const std::vector<float>& scores) {
  const Size size = output(c);
  std::vector<uint8_t> read(int64_t{c.n} * c.h * c.w);
  for (int64_t p = 0; p < static_cast<int64_t>(scores.size()); ++p)
    for (int i = 0; scores[p] >= 0 && i < c.kernel; ++i)
      for (int j = 0; j < c.kernel; ++j) {
        const int64_t y = p / size.w % size.h * c.stride - c.padding + i * c.dilation;
        const int64_t x = p % size.w * c.stride - c.padding + j * c.dilation;
        if (y >= 0 && y < c.h && x >= 0 && x < c.w) read[(p / (size.h * size.w) * c.h + y) * c.w + x] = 1;
      }
  return read;
}

// One convolution step, `depthwise` or not: masks, shortcuts, groups, odd channels, rows with something behind them.
void convolution(const Case& c, bool depthwise, std::mt19937& random) {
  PlanBuilder b;
  const Size size = output(c);
  const int64_t rows = int64_t{c.n} * size.h * size.w;
  const auto x = rounded(noise(random, int64_t{c.n} * c.h * c.w * c.in));
  const auto weight = rounded(noise(random, int64_t{c.out} * c.in / c.groups * c.kernel * c.kernel, 0.3f));
  const auto bias = noise(random, c.out), add = rounded(noise(random, rows * c.out));
  const int32_t out_dtype = c.float_out ? kFloat32 : kBfloat16;
  const int32_t in = b.value(c.h, c.w, c.in, true, c.in + 3, kBfloat16), out = b.value(size.h, size.w, c.out, true, 0, out_dtype);
  const int32_t logits = b.value(size.h, size.w, 1, true);
  const int32_t id = depthwise ? b.depthwise_bfloat16(weight, bias, c.in, c.kernel, c.stride, c.padding, c.dilation)
                               : b.conv(weight, bias, c.in, c.out, c.groups, c.kernel, c.stride, c.padding, c.dilation, kBfloat16);
  std::vector<float> scores(rows);
  for (float& s : scores) s = random() % 1000 < c.density * 1000 ? 1.0f : -1.0f;
  int32_t grid = -1;
  std::vector<uint8_t> read(int64_t{c.n} * c.h * c.w, 1);
  if (c.density >= 0) {
    grid = b.grid(size.h, size.w);
    b.step(kThreshold, logits, -1).grid = grid;
    read = reads(c, scores);
  }
  // Neither what no open output reads nor what lies behind a row may matter.
  std::vector<uint16_t> source(int64_t{c.n} * c.h * c.w * (c.in + 3), 0x7fc0);
  for (size_t p = 0; p < read.size(); ++p)
    for (int k = 0; read[p] && k < c.in; ++k) source[p * (c.in + 3) + k] = to_bfloat16(x[p * c.in + k]);
  Step& step = b.step(depthwise ? kDepthwise : kConv, in, out, id);
  step.grid = grid, step.activation[0] = c.activation;
  if (c.shortcut) step.in2 = out, step.activation[0] = kNone, step.final_activation = c.activation;
  auto half = halves(add);
  auto full = add;
  execute(b, c.n, c.threads, {source.data(), c.float_out ? static_cast<void*>(full.data()) : half.data(), scores.data()});
  auto want = convolve(c, x, weight, bias);
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] = act(want[i] + (c.shortcut ? add[i] : 0), c.activation);
    if (c.density >= 0 && scores[i / c.out] < 0) want[i] = add[i];
  }
  char what[200];
  std::snprintf(what, sizeof what, "%s n%d %dx%d in%d out%d g%d k%d s%d p%d d%d t%d density %.1f shortcut %d float %d act %d",
                depthwise ? "depthwise" : "conv", c.n, c.h, c.w, c.in, c.out, c.groups, c.kernel, c.stride, c.padding, c.dilation,
                c.threads, c.density, c.shortcut, c.float_out, c.activation);
  compare(what, c.float_out ? full : floats(half), want, c.float_out, c.in / c.groups * c.kernel * c.kernel);
}

void stem(const Case& c, bool planes, std::mt19937& random) {
  PlanBuilder b;
  const Size size = output(c);
  const auto x = noise(random, int64_t{c.n} * c.h * c.w * c.in);
  const auto weight = rounded(noise(random, int64_t{c.out} * c.in * c.kernel * c.kernel, 0.3f)), bias = noise(random, c.out);
  const int32_t in = b.value(c.h, c.w, c.in, true), out = b.value(size.h, size.w, c.out, true, 0, kBfloat16);
  const int32_t id = b.stem_bfloat16(weight, bias, c.in, c.out, c.kernel, c.stride, c.padding);
  b.step(kStem, in, out, id).activation[0] = c.activation;
  std::vector<float> picture = x;
  for (int64_t n = 0; planes && n < c.n; ++n)
    for (int64_t p = 0; p < c.h * c.w; ++p)
      for (int64_t k = 0; k < c.in; ++k) picture[(n * c.in + k) * c.h * c.w + p] = x[(n * c.h * c.w + p) * c.in + k];
  std::vector<uint16_t> result(int64_t{c.n} * size.h * size.w * c.out);
  execute(b, c.n, c.threads, {picture.data(), result.data()}, planes);
  auto want = convolve(c, rounded(x), weight, bias);
  for (double& w : want) w = act(w, c.activation);
  compare("stem", floats(result), want, false, c.in * c.kernel * c.kernel);
}

// A step from one map to one of the same size: `expected(row, channel)` says what comes out.
struct Map {
  int32_t n, h, w, channels, threads;
  int64_t count() const { return int64_t{n} * h * w * channels; }
};

std::vector<double> each(int64_t count, const std::function<double(int64_t)>& f) {
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = f(i);
  return values;
}

void elementwise(const Map& m, int activation, std::mt19937& random) {
  const int64_t area = int64_t{m.h} * m.w;
  const auto a = rounded(noise(random, m.count(), 3)), b2 = rounded(noise(random, m.count()));
  for (const int32_t kind : {kAdd, kMultiply})
    for (int form = 0; form < 3; ++form) {
      PlanBuilder b;
      const bool one_channel = form == 1, one_row = form == 2;
      const int32_t x = b.value(m.h, m.w, m.channels, true, 0, kBfloat16);
      const int32_t y = b.value(one_row ? 1 : m.h, one_row ? 1 : m.w, one_channel ? 1 : m.channels, true, 0, kBfloat16);
      const int32_t out = b.value(m.h, m.w, m.channels, true, 0, kBfloat16);
      Step& step = b.step(kind, x, out);
      step.in2 = y, step.activation[0] = activation;
      auto first = halves(a), second = halves(b2);
      std::vector<uint16_t> result(m.count());
      execute(b, m.n, m.threads, {first.data(), second.data(), result.data()});
      compare("pair", floats(result), each(m.count(), [&](int64_t i) {
                const int64_t row = i / m.channels;
                const double other = b2[one_channel ? row : one_row ? row / area * m.channels + i % m.channels : i];
                return act(kind == kAdd ? a[i] + other : a[i] * other, activation);
              }), false, 1);
    }
  // Within bfloat16, and conversions both ways.
  for (const auto& [from, to] : {std::pair{kBfloat16, kBfloat16}, {kFloat32, kBfloat16}, {kBfloat16, kFloat32}}) {
    PlanBuilder b;
    const int32_t x = b.value(m.h, m.w, m.channels, true, 0, from), out = b.value(m.h, m.w, m.channels, true, 0, to);
    b.step(kActivate, x, out).activation[0] = activation;
    auto half = halves(a);
    auto full = a;
    std::vector<uint16_t> half_out(m.count());
    std::vector<float> full_out(m.count());
    execute(b, m.n, m.threads, {from == kFloat32 ? static_cast<void*>(full.data()) : half.data(),
                                to == kFloat32 ? static_cast<void*>(full_out.data()) : half_out.data()});
    compare("activate", to == kFloat32 ? full_out : floats(half_out),
            each(m.count(), [&](int64_t i) { return act(a[i], activation); }), to == kFloat32, 1);
  }
}

void means(const Map& m, std::mt19937& random) {
  const int64_t area = int64_t{m.h} * m.w;
  const auto a = rounded(noise(random, m.count()));
  for (const Dtype to : {kFloat32, kBfloat16}) {
    PlanBuilder b;
    const int32_t x = b.value(m.h, m.w, m.channels, true, 0, kBfloat16), out = b.value(1, 1, m.channels, true, 0, to);
    b.step(kMean, x, out);
    auto half = halves(a);
    std::vector<uint16_t> half_out(m.n * m.channels);
    std::vector<float> full_out(m.n * m.channels);
    execute(b, m.n, m.threads, {half.data(), to == kFloat32 ? static_cast<void*>(full_out.data()) : half_out.data()});
    compare("mean", to == kFloat32 ? full_out : floats(half_out), each(m.n * m.channels, [&](int64_t i) {
              double sum = 0;
              for (int64_t p = 0; p < area; ++p) sum += a[(i / m.channels * area + p) * m.channels + i % m.channels];
              return sum / area;
            }), to == kFloat32, area);
  }
}

void layout(const Map& m, std::mt19937& random) {
  const int64_t area = int64_t{m.h} * m.w;
  const auto a = noise(random, m.count());
  for (const int32_t planes : {0, 1}) {
    PlanBuilder b;
    const int32_t x = b.value(m.h, m.w, m.channels, true), out = b.value(m.h, m.w, m.channels, true, 0, kBfloat16);
    b.step(kLayout, x, out);
    auto picture = a;
    std::vector<uint16_t> result(m.count());
    execute(b, m.n, m.threads, {picture.data(), result.data()}, planes);
    std::vector<uint16_t> want(m.count());
    for (int64_t i = 0; i < m.count(); ++i) {
      const int64_t row = i / m.channels, channel = i % m.channels;
      want[i] = to_bfloat16(a[planes ? (row / area * m.channels + channel) * area + row % area : i]);
    }
    if (result != want) ++failures, std::fprintf(stderr, "layout, planes %d\n", planes);
  }
}

void pooling(const Map& m, std::mt19937& random) {
  const auto a = rounded(noise(random, m.count()));
  const int32_t oh = (m.h - 1) / 2 + 1, ow = (m.w - 1) / 2 + 1;
  for (const int32_t kind : {kMaxPool, kAvgPool}) {
    PlanBuilder b;
    const int32_t x = b.value(m.h, m.w, m.channels, true, 0, kBfloat16), out = b.value(oh, ow, m.channels, true, 0, kBfloat16);
    Conv c{};
    c.in_channels = c.out_channels = m.channels, c.groups = 1;
    for (int i = 0; i < 2; ++i) c.kernel[i] = 3, c.stride[i] = 2, c.padding[i] = 1, c.dilation[i] = 1;
    b.convs.push_back(c);
    b.step(kind, x, out, 0);
    auto half = halves(a);
    std::vector<uint16_t> result(int64_t{m.n} * oh * ow * m.channels);
    execute(b, m.n, m.threads, {half.data(), result.data()});
    compare(kind == kMaxPool ? "max" : "average", floats(result), each(result.size(), [&](int64_t i) {
              const int64_t row = i / m.channels;
              double most = -1e30, sum = 0;
              int count = 0;
              for (int64_t y = row / ow % oh * 2 - 1; y < row / ow % oh * 2 + 2; ++y)
                for (int64_t xx = row % ow * 2 - 1; xx < row % ow * 2 + 2; ++xx) {
                  if (y < 0 || y >= m.h || xx < 0 || xx >= m.w) continue;
                  const double v = a[((row / (oh * ow) * m.h + y) * m.w + xx) * m.channels + i % m.channels];
                  most = std::max(most, v), sum += v, ++count;
                }
              return kind == kMaxPool ? most : sum / count;
            }), false, 9);
  }
}

void normalisation(const Map& m, std::mt19937& random) {
  const auto a = rounded(noise(random, m.count(), 2)), weight = noise(random, m.channels), bias = noise(random, m.channels);
  PlanBuilder b;
  const int32_t x = b.value(m.h, m.w, m.channels, true, 0, kBfloat16), out = b.value(m.h, m.w, m.channels, true, 0, kBfloat16);
  Conv c{};
  c.weight = b.keep(weight), c.bias = b.keep(bias), c.in_channels = c.out_channels = m.channels, c.groups = 1;
  for (int i = 0; i < 2; ++i) c.kernel[i] = c.stride[i] = c.dilation[i] = 1;
  b.convs.push_back(c);
  b.step(kLayerNorm, x, out, 0).floats[0] = 1e-3f;
  auto half = halves(a);
  std::vector<uint16_t> result(m.count());
  execute(b, m.n, m.threads, {half.data(), result.data()});
  compare("layer norm", floats(result), each(m.count(), [&](int64_t i) {
            const int64_t start = i / m.channels * m.channels;
            double mean = 0, variance = 0;
            for (int64_t k = 0; k < m.channels; ++k) mean += a[start + k] / m.channels;
            for (int64_t k = 0; k < m.channels; ++k) variance += (a[start + k] - mean) * (a[start + k] - mean) / m.channels;
            return (a[i] - mean) / std::sqrt(variance + 1e-3) * weight[i % m.channels] + bias[i % m.channels];
          }), false, m.channels);
}

// A squeeze gate: 3x3 plus the mean times a Linear; logits are float32, and weights where it does not go patch by patch. At
// stride 1 its taps have biases, too.
void gate(const Map& m, int32_t stride, std::mt19937& random) {
  const int64_t area = int64_t{m.h} * m.w;
  const int32_t h = (m.h - 1) / stride + 1, w = (m.w - 1) / stride + 1;
  const bool biased = stride == 1;
  const auto a = rounded(noise(random, m.count())), given = noise(random, 10 * m.channels), bias = noise(random, 10);
  const auto weight = stride <= 2 ? rounded(given) : given;
  PlanBuilder b;
  const int32_t x = b.value(m.h, m.w, m.channels, true, 0, kBfloat16), out = b.value(h, w, 1, true);
  const int32_t sums = b.value(m.h, 1, 1);
  Conv c{};
  c.weight = b.keep(given), c.bias = b.keep(bias), c.in_channels = m.channels, c.out_channels = 1, c.groups = 1;
  for (int i = 0; i < 2; ++i) c.kernel[i] = 3, c.stride[i] = stride, c.padding[i] = c.dilation[i] = 1;
  b.convs.push_back(c);
  Step& step = b.step(kGate, x, out, 0);
  step.ints[0] = 1, step.ints[1] = biased, step.aux[0] = sums;
  auto half = halves(a);
  std::vector<float> result(m.n * h * w);
  execute(b, m.n, m.threads, {half.data(), result.data()});
  compare("gate", result, each(m.n * h * w, [&](int64_t p) {
            const int64_t image = p / (h * w);
            double sum = bias[0];
            for (int t = 0; t < 9; ++t) {
              const int64_t y = p / w % h * stride + t / 3 - 1, xx = p % w * stride + t % 3 - 1;
              if (y < 0 || y >= m.h || xx < 0 || xx >= m.w) continue;
              if (biased) sum += bias[1 + t];
              for (int64_t k = 0; k < m.channels; ++k)
                sum += double(weight[t * m.channels + k]) * a[(image * area + y * m.w + xx) * m.channels + k];
            }
            for (int64_t k = 0; k < m.channels; ++k)
              for (int64_t q = 0; q < area; ++q)
                sum += double(weight[9 * m.channels + k]) * a[(image * area + q) * m.channels + k] / area;
            return sum;
          }), true, 10 * m.channels);
}

bool refuses() {
  PlanBuilder b;
  const int32_t x = b.value(2, 2, 4, true, 0, kBfloat16), out = b.value(2, 2, 4, true, 0, kBfloat16);
  b.step(kActivate, x, out);
  std::string reason;
  void* plan = b.create(&reason);
  if (plan) dynaconv_plan_destroy(plan);
  return !plan && reason.find("AVX512_BF16") != std::string::npos;
}

}  // namespace

int main() {
  if (!has_bfloat16()) {
    const bool refused = refuses();
    std::printf("no AVX512_BF16 here: %s\n", refused ? "refused with the reason" : "NOT REFUSED");
    return !refused;
  }
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int> of) { return *(of.begin() + random() % of.size()); };
  for (int i = 0; i < cases(600); ++i) {
    Case c{};
    c.n = pick({1, 2, 3}), c.h = pick({1, 2, 5, 7, 12}), c.w = pick({1, 3, 7, 14, 19});
    c.groups = pick({1, 1, 1, 2, 5});
    c.in = c.groups * pick({1, 3, 8, 17, 64}), c.out = c.groups * pick({1, 7, 16, 24, 33, 64});
    c.kernel = pick({1, 1, 3, 5}), c.stride = pick({1, 1, 2, 3}), c.dilation = c.kernel > 1 ? pick({1, 1, 2}) : 1;
    c.padding = c.dilation * (c.kernel / 2), c.threads = pick({1, 2, 3});
    c.density = pick({-1, 0, 3, 5, 10}) / 10.0, c.shortcut = random() % 2;
    if (c.density < 0) c.density = -1;
    c.float_out = random() % 4 == 0, c.activation = pick({kNone, kRelu, kRelu6, kSilu, kHardswish, kGelu, kLeakyRelu});
    convolution(c, false, random);
  }
  // Maps that lie far away, whose rows are fetched while others are multiplied.
  for (const bool shortcut : {false, true})
    for (const double density : {-1.0, 0.1})
      for (const int32_t kernel : {1, 3}) {
        Case c{};
        c.n = 2, c.h = 115, c.w = 131, c.in = 39, c.out = 42, c.groups = 1, c.kernel = kernel, c.stride = kernel == 1 ? 1 : 2;
        c.padding = kernel / 2, c.dilation = 1, c.threads = 2, c.density = density, c.shortcut = shortcut;
        c.activation = kRelu;
        convolution(c, false, random);
      }
  for (int i = 0; i < cases(600); ++i) {
    Case c{};
    c.n = pick({1, 2, 3}), c.h = pick({3, 5, 7, 12}), c.w = pick({3, 7, 14, 19});
    c.in = c.out = c.groups = pick({1, 8, 16, 32, 40, 64, 72});
    c.kernel = pick({1, 2, 3, 3, 3, 5, 5, 7}), c.stride = pick({1, 1, 2, 3}), c.dilation = i % 4 ? 1 : 2;
    c.padding = c.dilation * (c.kernel / 2), c.threads = pick({1, 2, 3});
    c.density = pick({-1, 0, 3, 5, 10}) / 10.0, c.shortcut = random() % 2;
    if (c.density < 0) c.density = -1;
    c.activation = pick({kNone, kRelu, kRelu6, kSilu, kHardswish, kGelu, kLeakyRelu});
    convolution(c, true, random);
  }
  for (int i = 0; i < cases(60); ++i) {
    Case c{};
    c.n = pick({1, 2}), c.h = pick({5, 9, 16}), c.w = pick({3, 20, 33}), c.in = pick({1, 3, 4}), c.out = pick({8, 16, 33, 64});
    c.groups = 1, c.kernel = pick({2, 3, 4, 5, 7}), c.stride = pick({1, 2, 4}), c.dilation = 1, c.padding = c.kernel / 2;
    c.threads = pick({1, 2}), c.activation = pick({kNone, kRelu, kSilu});
    stem(c, random() % 2, random);
  }
  for (const int32_t channels : {1, 3, 8, 16, 24, 40, 64, 130}) {
    const Map m{2, 5, 7, channels, 2};
    for (int32_t activation = kNone; activation < kActivations; ++activation) elementwise(m, activation, random);
    means(m, random), layout(m, random), pooling(m, random), normalisation(m, random);
    for (const auto& [h, w] : {std::pair{5, 7}, {8, 15}, {1, 30}, {9, 1}, {2, 2}})
      for (const int32_t stride : {1, 2, 3}) gate({2, h, w, channels, 2}, stride, random);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
