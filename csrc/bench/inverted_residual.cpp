// Times the fused inverted residual on every block shape of MobileNetV2 at 224, and on shapes given on the command line.
//   inverted_residual [threads] [density] [band] [batch] [cold]
// cold = 1: between runs every thread reads more than its L2 cache holds, as the rest of a network does.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "../kernels/gemm.h"
#include "../kernels/inverted_residual.h"
#include "../kernels/isa.h"
#include "../plan/plan.h"

namespace {

constexpr double kMostSeconds = 0.3;  // for one shape

struct Shape {
  int size, channels, expansion, out_channels, stride, kernel, times;
};

constexpr Shape kShapes[] = {
    {112, 32, 1, 16, 1, 3, 1}, {112, 16, 6, 24, 2, 3, 1}, {56, 24, 6, 24, 1, 3, 1},  {56, 24, 6, 32, 2, 3, 1},
    {28, 32, 6, 32, 1, 3, 2},  {28, 32, 6, 64, 2, 3, 1},  {14, 64, 6, 64, 1, 3, 3},  {14, 64, 6, 96, 1, 3, 1},
    {14, 96, 6, 96, 1, 3, 2},  {14, 96, 6, 160, 2, 3, 1}, {7, 160, 6, 160, 1, 3, 2}, {7, 160, 6, 320, 1, 3, 1},
    {56, 32, 6, 32, 1, 3, 0},
};

std::vector<float> numbers(int64_t count, float scale) {
  static std::mt19937 engine(1);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

// A disc around the middle, as masks of objects are, and what a 3x3 kernel of this stride reads for it.
void mask(double density, int out, int in, int stride, int kernel, int64_t images, std::vector<uint8_t>& need,
          std::vector<uint8_t>& need_hidden) {
  std::vector<std::pair<double, int>> distance(out * out);
  for (int y = 0; y < out; ++y)
    for (int x = 0; x < out; ++x)
      distance[y * out + x] = {(y - out * 0.4) * (y - out * 0.4) + (x - out * 0.55) * (x - out * 0.55), y * out + x};
  std::sort(distance.begin(), distance.end());
  need.assign(images * out * out, 0);
  need_hidden.assign(images * in * in, 0);
  for (int64_t n = 0; n < images; ++n)
    for (int i = 0; i < density * out * out; ++i) {
      const int at = distance[i].second;
      need[n * out * out + at] = 1;
      for (int dy = 0; dy < kernel; ++dy)
        for (int dx = 0; dx < kernel; ++dx) {
          const int y = at / out * stride + dy - kernel / 2, x = at % out * stride + dx - kernel / 2;
          if (y >= 0 && y < in && x >= 0 && x < in) need_hidden[n * in * in + y * in + x] = 1;
        }
    }
}

// Threads that spin between runs, as those of a plan do between steps.
class Pool {
 public:
  Pool(int threads, bool cold) : threads_(threads), other_(cold ? threads * kOtherFloats : 0, 1.0f) {}

  double run(const InvertedArgs& args, std::vector<std::vector<char>>& scratch, int rounds) {
    double best = 1e30;
    std::vector<std::thread> others;
    const auto work = [&](int id) {
      double begin = 0;
      for (int round = 0; round < rounds; ++round) {
        float sum = 0;
        for (size_t i = 0; i < other_.size() / threads_; i += 16) sum += other_[id * kOtherFloats + i];
        sink_ = sum;
        wait();
        const double start = met_;
        if (round == 0) begin = start;
        for (int phase = 0; phase < inverted_phases(args); ++phase) {
          const int64_t chunks = inverted_chunks(args, phase);
          for (int64_t chunk; (chunk = next_[phase].fetch_add(1)) < chunks;)
            inverted_run_chunk(args, phase, chunk, aligned(scratch[id]));
          wait();
        }
        if (id == 0) {
          best = std::min(best, met_ - start);
          next_[0] = next_[1] = 0;
        }
        // Both threads read the same time and leave together.
        if (met_ - begin > kMostSeconds) break;
      }
    };
    for (int id = 1; id < threads_; ++id) others.emplace_back(work, id);
    work(0);
    for (auto& other : others) other.join();
    return best;
  }

  static void* aligned(std::vector<char>& block) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block.data()) + 63) / 64 * 64);
  }

 private:
  void wait() {
    const int round = round_;
    if (++arrived_ == threads_) {
      met_ = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
      arrived_ = 0;
      round_ = round + 1;
    } else {
      for (int spins = 0; round_ == round; ++spins)
        if (spins > 20000) std::this_thread::yield();
    }
  }

  static constexpr int64_t kOtherFloats = 1 << 20;
  const int threads_;
  std::vector<float> other_;
  volatile float sink_ = 0;
  double met_ = 0;  // when the last thread came
  std::atomic<int> arrived_{0}, round_{0};
  std::atomic<int64_t> next_[2] = {};
};

}  // namespace

int main(int count, char** words) {
  const int threads = count > 1 ? std::atoi(words[1]) : 2;
  const double density = count > 2 ? std::atof(words[2]) : 1;
  const int band = count > 3 ? std::atoi(words[3]) : 0;
  const int64_t images = count > 4 ? std::atoi(words[4]) : 1;
  const bool cold = count > 5 && std::atoi(words[5]);
  std::printf("%s, %d threads, density %.2f, batch %d\n", best_isa(), threads, density, static_cast<int>(images));
  double total = 0, macs_total = 0;
  for (const Shape& shape : kShapes) {
    if (const char* only = std::getenv("ONLY"); only && std::atoi(only) != &shape - kShapes) continue;
    const int out = (shape.size - 1) / shape.stride + 1, hidden = shape.channels * shape.expansion;
    const auto panels = [](int channels) { return (channels + kPanel - 1) / kPanel * kPanel; };
    InvertedArgs args{};
    args.images = images;
    args.height = args.width = shape.size;
    args.out_height = args.out_width = out;
    args.channels = shape.channels;
    args.hidden = hidden;
    args.out_channels = shape.out_channels;
    for (int i = 0; i < 2; ++i) {
      args.kernel[i] = shape.kernel;
      args.stride[i] = shape.stride;
      args.padding[i] = shape.kernel / 2;
      args.dilation[i] = 1;
    }
    const auto in = numbers(images * shape.size * shape.size * shape.channels, 1);
    auto result = numbers(images * out * out * shape.out_channels, 1);
    const auto weights = numbers(int64_t{panels(hidden)} * shape.channels + shape.kernel * shape.kernel * hidden +
                                     int64_t{panels(shape.out_channels)} * hidden, 0.1f);
    const std::vector<float> bias(panels(hidden) + 512, 0.1f), zeros(hidden + 64, 0.0f);
    args.expand_weight = shape.expansion > 1 ? weights.data() : nullptr;
    args.depthwise_weight = weights.data() + int64_t{panels(hidden)} * shape.channels;
    args.project_weight = args.depthwise_weight + shape.kernel * shape.kernel * hidden;
    args.expand_bias = args.depthwise_bias = args.project_bias = bias.data();
    args.activation[0] = args.activation[1] = kRelu6;
    args.in = in.data();
    args.in_stride = shape.channels;
    args.out = result.data();
    args.out_stride = shape.out_channels;
    if (shape.stride == 1 && shape.channels == shape.out_channels) args.residual = in.data();
    args.residual_stride = shape.channels;
    args.zeros = zeros.data();
    args.threads = threads;
    args.band = band;
    std::vector<uint8_t> need, need_hidden;
    if (density < 1) {
      mask(density, out, shape.size, shape.stride, shape.kernel, images, need, need_hidden);
      args.need = need.data();
      args.need_hidden = need_hidden.data();
    }
    std::vector<float> shared(inverted_shared_bytes(args) / 4 + 16);
    args.shared = shared.data();
    std::vector<std::vector<char>> scratch(threads, std::vector<char>(inverted_scratch_bytes(args) + 64));
    double open = 1.0 * images * out * out, open_hidden = 1.0 * images * shape.size * shape.size;
    if (density < 1) {
      open = std::count(need.begin(), need.end(), 1);
      open_hidden = std::count(need_hidden.begin(), need_hidden.end(), 1);
    }
    const double macs = (args.expand_weight ? open_hidden * hidden * shape.channels : 0) +
                        open * hidden * (shape.kernel * shape.kernel + shape.out_channels);
    Pool pool(threads, cold);
    pool.run(args, scratch, 20);
    const double best = pool.run(args, scratch, std::max(50, static_cast<int>(4e9 / macs)));
    std::printf("%3d x %3d  e%d -> %3d s%d k%d  %8.1f us  %6.1f MMAC  %5.1f GMAC/s  x%d\n", shape.size, shape.channels,
                shape.expansion, shape.out_channels, shape.stride, shape.kernel, best * 1e6, macs / 1e6, macs / best / 1e9,
                shape.times);
    total += best * shape.times;
    macs_total += macs * shape.times;
  }
  std::printf("MobileNetV2 blocks: %.3f ms, %.1f MMAC, %.1f GMAC/s\n", total * 1e3, macs_total / 1e6, macs_total / total / 1e9);
}
