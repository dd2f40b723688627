// Convolutions with a kernel for each sample, mixed from experts panel by panel.
//
// Where the mixed weights of an image are small, all threads mix them once and then convolve with them. Where they are
// large, a thread mixes a panel in chunks that stay in its L2 cache and multiplies at once, for one image after the
// other, so that the experts are read from memory once for the whole batch.

#include <algorithm>
#include <cstring>

#include "../kernels/depthwise.h"
#include "conv_rows.h"
#include "panels.h"
#include "winograd_tiles.h"

namespace {

constexpr int64_t kSumsBytes = 1 << 20;  // of the sums of a panel over chunks, for as many images as fit
// Of positions that a Winograd tile must save to be worth its transforms and those of the weights.
constexpr double kTilePositions = 2.3;
constexpr double kTransformPositions = 5;

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tiles_of_image(const Value& out) { return int64_t{(out.height + 1) / 2} * ((out.width + 1) / 2); }

// Which rows (or tiles) a step computes, image by image.
struct Images {
  const Position* list = nullptr;
  const int32_t* counts = nullptr;
  int64_t area = 0, all = 0;  // positions of an image; rows over the batch
  bool closed = false;

  int64_t count(int64_t image) const {
    if (!list) return area;
    return closed ? area - counts[image] : counts[image];
  }
  int64_t first(int64_t image) const {
    if (!list) return image * area;
    int64_t sum = 0;
    for (int64_t i = 0; i < image; ++i) sum += count(i);
    return sum;
  }
  int64_t most(int64_t images) const {
    int64_t most = 0;
    for (int64_t i = 0; i < images; ++i) most = std::max(most, count(i));
    return most;
  }
};

Images rows_of(const Run& run, const Step& step) {
  Images rows;
  const Value& out = run.value(step.out);
  rows.area = int64_t{out.height} * out.width;
  rows.all = run.rows(step.out);
  if (step.grid < 0) return rows;
  const GridState& grid = run.context.grids[step.grid];
  const int64_t listed = step.closed ? rows.all - grid.open_count : grid.open_count;
  if (listed == rows.all || (!step.closed && double(listed) > double(step.run_all_above) * rows.all)) return rows;
  rows.list = step.closed ? grid.closed : grid.open;
  rows.counts = grid.image_counts;
  rows.closed = step.closed != 0;
  rows.all = listed;
  return rows;
}

Images tiles_of(const Run& run, const Step& step, const Images& rows) {
  Images tiles;
  tiles.area = tiles_of_image(run.value(step.out));
  tiles.all = run.call.images * tiles.area;
  if (!rows.list) return tiles;
  const GridState& grid = run.context.grids[step.grid];
  tiles.list = grid.tiles;
  tiles.counts = grid.tile_counts;
  tiles.all = grid.tile_count;
  return tiles;
}

// Where things lie in a thread's scratch.
struct Scratch {
  float *mixer, *weights, *sums, *bias;
  char* rest;

  Scratch(char* base, const PanelShape& shape, int64_t sums_floats, int64_t* bytes = nullptr) {
    int64_t at = 0;
    const auto take = [&](int64_t floats) {
      auto* from = reinterpret_cast<float*>(base + at);
      at += ceil_of(floats * 4, 64) * 64;
      return from;
    };
    mixer = take(shape.scratch_floats());
    weights = take(shape.small ? 0 : kMostMixed * shape.panel_floats(shape.chunk));
    sums = take(sums_floats);
    bias = take(kPanel);
    rest = base + at;
    if (bytes) *bytes = at;
  }
};

// Floats of sums for one image: of every row, or of every point of every tile.
int64_t sums_of_image(const PanelShape& shape, const Value& out) {
  const int64_t rows = int64_t{out.height} * out.width;
  return kPanel * (shape.winograd ? std::max(rows, kWinogradPoints * tiles_of_image(out)) : rows);
}

struct Task {
  Worker& worker;
  const Run& run;
  const Step& step;
  const PanelShape& shape;
  const Conv& conv;
  const Value& out;
  int64_t images;
  Images rows, tiles;
  Scratch scratch;

  Task(Worker& w, const Step& s, const PanelShape& p)
      : worker(w), run(w.run), step(s), shape(p), conv(run.conv(s.conv[0])), out(run.value(s.out)),
        images(run.call.images), rows(rows_of(run, s)), scratch(w.scratch, p, sums_floats(p, out)) {
    if (shape.winograd) tiles = tiles_of(run, s, rows);
  }

  static int64_t sums_floats(const PanelShape& shape, const Value& out) {
    if (shape.depthwise) return shape.taps * kPanel;
    if (shape.small) return shape.winograd ? kWinogradPoints * kMostWinogradTiles * (winograd_row(shape.channels) + kPanel) : 0;
    return std::max<int64_t>(kSumsBytes / 4, sums_of_image(shape, out));
  }
  bool use_winograd() const {
    if (!shape.winograd || step.closed) return false;
    return double(tiles.all) * kTilePositions + kTransformPositions * images < double(rows.all);
  }
  PanelMixer mixer() const { return PanelMixer(run, step, shape, scratch.mixer); }

  // What all threads share: weights of every image and panel, then biases.
  float* shared_weights(int64_t image, int64_t panel) const {
    return reinterpret_cast<float*>(worker.shared) + (image * shape.panels + panel) * shape.panel_floats(shape.channels);
  }
  float* shared_bias(int64_t image, int64_t panel) const {
    return shared_weights(images, 0) + (image * shape.panels + panel) * kPanel;
  }

  void mix_shared(bool winograd) const {
    const int64_t groups = ceil_of(images, kMostMixed);
    const int64_t useful = std::max<int64_t>(ceil_of(shape.channels, shape.chunk), shape.channels / 16);
    const int64_t splits = std::min(useful, std::max(ceil_of(shape.channels, shape.chunk),
                                                     ceil_of(4 * worker.threads, shape.panels * groups)));
    worker.share(shape.panels * groups * splits, [&](int64_t task) {
      const int64_t split = task % splits, panel = task / splits % shape.panels;
      const int64_t image = task / splits / shape.panels * kMostMixed;
      const int count = static_cast<int>(std::min<int64_t>(kMostMixed, images - image));
      const int64_t first = shape.channels * split / splits, last = shape.channels * (split + 1) / splits;
      PanelMixer own = mixer();
      const int64_t step_floats = winograd ? shape.channels * kPanel + kPanel : shape.channels * kPanel;
      own.mix(panel, image, count, first, last - first,
              {shared_weights(image, panel) + first * kPanel, shape.panels * shape.panel_floats(shape.channels),
               step_floats, winograd}, true);
      if (split == 0)
        for (int i = 0; i < count; ++i) own.bias(panel, image + i, shared_bias(image + i, panel));
    });
    worker.barrier();
  }

  TileCall tile_call(int64_t panel) const {
    TileCall call{};
    call.taps_count = static_cast<int>(shape.taps);
    call.channels = shape.channels;
    call.tap_offset = panel / shape.per_group * shape.channels;
    call.column = shape.first_output(panel);
    call.columns = shape.columns(panel);
    call.activation = step.activation[0];
    call.final_activation = step.final_activation;
    return call;
  }

  void shared_direct() const {
    const int64_t depth = shape.taps * shape.channels, most = rows.most(images);
    if (most == 0) return;
    const Value& in = run.value(step.in);
    const int64_t touched = shape.taps == 1 ? 1 : int64_t{conv.stride[0]} * conv.stride[1];
    const Cut all = cut(most, in.stride * 4 * touched, shape.panels, depth * kPanel * 4,
                        double(depth) * std::min<int64_t>(kPanel, shape.outputs),
                        images >= 4 * worker.threads ? 1 : worker.threads);
    const ConvRows place(run, step, worker.zeros);
    worker.share(images * all.tasks(), [&](int64_t task) {
      const int64_t image = task / all.tasks(), block = task % all.row_blocks, group = task % all.tasks() / all.row_blocks;
      Cut own = all;
      own.rows = rows.count(image);
      const int64_t first = own.first_row(block), count = own.first_row(block + 1) - first;
      if (count <= 0) return;
      const RowTable table = place.table(scratch.rest, rows.list, rows.first(image) + first, count);
      for (int64_t panel = own.first_panel(group); panel < own.first_panel(group + 1); ++panel) {
        TileCall call = tile_call(panel);
        call.weight = shared_weights(image, panel);
        call.bias = shared_bias(image, panel);
        for (int64_t tile = 0; tile < table.tiles; ++tile) {
          table.point(call, tile);
          gemm_tile(kFloat32, table.rows_of(tile), call.columns)(call);
        }
      }
    });
  }

  void shared_winograd() const {
    const WinogradTiles place(run, step, tiles.list, worker.zeros);
    const int64_t channels = shape.channels, row = winograd_row(channels), most = winograd_tiles_of_task(channels);
    const int64_t largest = tiles.most(images), threads = worker.threads;
    int64_t blocks = ceil_of(largest, most), groups = 1;
    if (threads > 1 && images * blocks < 4 * threads && largest >= 2 * kMaxRows * threads)
      blocks = std::max<int64_t>(ceil_of(blocks, threads) * threads, threads);
    else if (images * blocks < 2 * threads)
      groups = std::min(shape.panels, 2 * threads);
    worker.share(images * blocks * groups, [&](int64_t task) {
      const int64_t image = task / (blocks * groups), block = task % blocks, group = task / blocks % groups;
      const int64_t own = tiles.count(image), from = own * block / blocks, count = own * (block + 1) / blocks - from;
      if (count <= 0) return;
      const int64_t first = tiles.first(image) + from;
      float *transformed = scratch.sums, *products = transformed + kWinogradPoints * count * row;
      for (int64_t t = 0; t < count; ++t) place.transform(place.tile(first + t), 0, channels, transformed + t * row, count * row);
      for (int64_t panel = shape.panels * group / groups; panel < shape.panels * (group + 1) / groups; ++panel) {
        WinogradProducts{transformed, count * row, row, count, shared_weights(image, panel), channels * kPanel + kPanel, channels,
                         products, false}.run();
        for (int64_t t = 0; t < count; ++t)
          place.finish(place.tile(first + t), products + t * kPanel, count * kPanel, shared_bias(image, panel), panel);
      }
    });
  }

  // f(first image, one past the last) for as many images as the sums have room for.
  template <typename F>
  void image_blocks(int64_t floats_of_image, F&& f) const {
    const int64_t fit = std::max<int64_t>(1, sums_floats(shape, out) / std::max<int64_t>(1, floats_of_image));
    for (int64_t image = 0; image < images; image += fit) f(image, std::min(images, image + fit));
  }
  // f(first channel, channels, first image, images) for chunks of channels and groups of images whose weights are mixed.
  template <typename F>
  void chunks(PanelMixer& own, int64_t panel, int64_t first_image, int64_t last_image, int most, bool winograd, F&& f) const {
    for (int64_t first = 0; first < shape.channels; first += shape.chunk) {
      const int64_t channels = std::min(shape.chunk, shape.channels - first);
      for (int64_t image = first_image; image < last_image; image += most) {
        const int count = static_cast<int>(std::min<int64_t>(most, last_image - image));
        const int64_t step_floats = channels * kPanel + (winograd ? kPanel : 0);
        own.mix(panel, image, count, first, channels,
                {scratch.weights, shape.panel_floats(shape.chunk), step_floats, winograd}, image == first_image);
        f(first, channels, image, count);
      }
    }
  }

  void fresh_direct() const {
    const ConvRows place(run, step, worker.zeros);
    const int64_t most = rows.most(images);
    const bool once = shape.chunk == shape.channels;
    worker.share(shape.panels, [&](int64_t panel) {
      PanelMixer own = mixer();
      image_blocks(once ? 1 : most * kPanel, [&](int64_t begin, int64_t end) {
        chunks(own, panel, begin, end, kMostMixed, false, [&](int64_t first, int64_t channels, int64_t image, int count) {
          for (int i = 0; i < count; ++i) {
            own.bias(panel, image + i, scratch.bias);
            float* sums = scratch.sums + (image + i - begin) * most * kPanel;
            multiply(place, panel, image + i, scratch.weights + i * shape.panel_floats(shape.chunk), first, channels,
                     once ? nullptr : sums);
          }
        });
        if (!once)
          for (int64_t image = begin; image < end; ++image) finish(place, panel, image, scratch.sums + (image - begin) * most * kPanel);
      });
    });
  }

  // All rows of an image by the weights of some channels; into the result, or added to sums.
  void multiply(const ConvRows& place, int64_t panel, int64_t image, const float* weight, int64_t first_channel,
                int64_t channels, float* sums) const {
    static constexpr float kNoBias[kPanel] = {};
    const int64_t count = rows.count(image), first = rows.first(image), most = kMostTiles * kMaxRows;
    TileCall call = tile_call(panel);
    call.channels = channels;
    call.tap_offset += first_channel;
    call.weight = weight;
    call.bias = first_channel ? kNoBias : scratch.bias;
    if (sums) {
      call.column = 0;
      call.columns = kPanel;
      call.activation = call.final_activation = kNone;
    }
    for (int64_t from = 0; from < count; from += most) {
      const RowTable table = place.table(scratch.rest, rows.list, first + from, std::min(most, count - from));
      for (int64_t tile = 0; tile < table.tiles; ++tile) {
        table.point(call, tile);
        void* outs[kMaxRows];
        if (sums) {
          for (int r = 0; r < table.rows_of(tile); ++r) outs[r] = sums + (from + table.first_of(tile) + r) * kPanel;
          call.out = outs;
          call.residual = first_channel ? outs : nullptr;
        }
        gemm_tile(kFloat32, table.rows_of(tile), call.columns)(call);
      }
    }
  }

  void finish(const ConvRows& place, int64_t panel, int64_t image, const float* sums) const {
    const int64_t count = rows.count(image), first = rows.first(image), most = kMostTiles * kMaxRows;
    const int64_t column = shape.first_output(panel);
    for (int64_t from = 0; from < count; from += most) {
      const RowTable table = place.table(scratch.rest, rows.list, first + from, std::min(most, count - from));
      for (int64_t tile = 0; tile < table.tiles; ++tile) {
        for (int r = 0; r < table.rows_of(tile); ++r) {
          const int64_t at = tile * kMaxRows + r;
          const auto* add = table.adds ? static_cast<const float*>(table.adds[at]) + column : nullptr;
          winograd_kernels().finish(sums + (from + table.first_of(tile) + r) * kPanel, shape.columns(panel),
                                    step.activation[0], step.final_activation, add,
                                    static_cast<float*>(table.outs[at]) + column);
        }
      }
    }
  }

  void fresh_winograd() const {
    const WinogradTiles place(run, step, tiles.list, worker.zeros);
    const int64_t most = tiles.most(images);
    // Chunks one after the other, each [images][points][tiles][channels].
    auto* const transformed = reinterpret_cast<float*>(worker.shared);
    const int64_t positions = kWinogradPoints * tiles_of_image(out);
    constexpr int64_t kBlock = 4;
    const int64_t blocks = ceil_of(most, kBlock);
    worker.share(images * blocks, [&](int64_t task) {
      const int64_t image = task / blocks, count = tiles.count(image), start = tiles.first(image);
      for (int64_t t = task % blocks * kBlock; t < std::min(count, (task % blocks + 1) * kBlock); ++t) {
        const Position at = place.tile(start + t);
        for (int64_t first = 0; first < shape.channels; first += shape.chunk) {
          const int64_t channels = std::min(shape.chunk, shape.channels - first);
          float* own = transformed + images * positions * first + image * positions * channels;
          place.transform(at, first, channels, own + t * channels, count * channels);
        }
      }
    });
    worker.barrier();
    worker.share(shape.panels, [&](int64_t panel) {
      PanelMixer own = mixer();
      const int64_t sums_floats = kWinogradPoints * most * kPanel;
      image_blocks(sums_floats, [&](int64_t begin, int64_t end) {
        chunks(own, panel, begin, end, 2, true, [&](int64_t first, int64_t channels, int64_t image, int count) {
          for (int i = 0; i < count; ++i) {
            const int64_t here = tiles.count(image + i);
            WinogradProducts{transformed + images * positions * first + (image + i) * positions * channels, here * channels,
                             channels, here, scratch.weights + i * shape.panel_floats(shape.chunk),
                             channels * kPanel + kPanel, channels,
                             scratch.sums + (image + i - begin) * sums_floats, first > 0}.run();
          }
        });
        for (int64_t image = begin; image < end; ++image) {
          own.bias(panel, image, scratch.bias);
          const float* products = scratch.sums + (image - begin) * sums_floats;
          const int64_t here = tiles.count(image), first = tiles.first(image);
          for (int64_t t = 0; t < here; ++t)
            place.finish(place.tile(first + t), products + t * kPanel, here * kPanel, scratch.bias, panel);
        }
      });
    });
  }

  void run_depthwise() const {
    const int64_t channels = conv.out_channels, floats = (shape.taps + 1) * channels;
    auto* const shared = reinterpret_cast<float*>(worker.shared);
    worker.share(images * shape.panels, [&](int64_t task) {
      const int64_t image = task / shape.panels, panel = task % shape.panels;
      float* const weight = shared + image * floats;
      PanelMixer own = mixer();
      own.mix(panel, image, 1, 0, 1, {scratch.sums, 0, kPanel, false}, false);
      own.bias(panel, image, scratch.bias);
      const int64_t bytes = shape.columns(panel) * int64_t{sizeof(float)};
      for (int64_t t = 0; t < shape.taps; ++t)
        std::memcpy(weight + t * channels + panel * kPanel, scratch.sums + t * kPanel, bytes);
      std::memcpy(weight + shape.taps * channels + panel * kPanel, scratch.bias, bytes);
    });
    worker.barrier();
    DepthwiseArgs args = depthwise_args();
    const DepthwiseArgs first = args;
    const int64_t chunks = depthwise_chunks(args, worker.threads), in_area = int64_t{args.height} * args.width;
    worker.share(images * chunks, [&](int64_t task) {
      const int64_t image = task / chunks;
      DepthwiseArgs own = first;
      own.weight = shared + image * floats;
      own.bias = own.weight + shape.taps * channels;
      own.in += image * in_area * own.in_stride;
      own.out += image * rows.area * own.out_stride;
      if (own.residual) own.residual += image * rows.area * own.residual_stride;
      if (own.need) own.need += image * rows.area;
      depthwise_run_chunk(own, chunks, task % chunks);
    });
  }

  // Of one image, without weights.
  DepthwiseArgs depthwise_args() const {
    const Value& in = run.value(step.in);
    DepthwiseArgs args{};
    args.images = 1;
    args.height = in.height;
    args.width = in.width;
    args.out_height = out.height;
    args.out_width = out.width;
    args.channels = out.channels;
    for (int i = 0; i < 2; ++i) {
      args.kernel[i] = conv.kernel[i];
      args.stride[i] = conv.stride[i];
      args.padding[i] = conv.padding[i];
      args.dilation[i] = conv.dilation[i];
    }
    args.in = reinterpret_cast<const float*>(run.data(step.in));
    args.in_stride = in.stride;
    args.out = reinterpret_cast<float*>(run.data(step.out));
    args.out_stride = out.stride;
    if (step.in2 >= 0) {
      args.residual = reinterpret_cast<const float*>(run.data(step.in2));
      args.residual_stride = run.value(step.in2).stride;
    }
    args.activation = step.activation[0];
    args.final_activation = step.final_activation;
    args.need = run.need(step.grid, step.run_all_above);
    args.zeros = worker.zeros;
    return args;
  }
};

}  // namespace

int64_t scratch_dynamic(const Plan& plan, const Step& step) {
  const PanelShape shape(plan, step);
  int64_t bytes = 0;
  Scratch(nullptr, shape, Task::sums_floats(shape, plan.values[step.out]), &bytes);
  return bytes + table_bytes(shape.taps);
}

int64_t shared_dynamic(const Plan& plan, const Step& step, int64_t images) {
  const PanelShape shape(plan, step);
  const Conv& conv = plan.convs[step.conv[0]];
  if (shape.depthwise) return images * (shape.taps + 1) * conv.out_channels * 4 + kSlack;
  if (shape.small) return images * shape.panels * (shape.panel_floats(shape.channels) + kPanel) * 4 + kSlack;
  if (!shape.winograd) return 0;
  return images * kWinogradPoints * tiles_of_image(plan.values[step.out]) * shape.channels * 4 + kSlack;
}

void step_dynamic_conv(Worker& worker, const Step& step) {
  const PanelShape shape(worker.run.plan, step);
  const Task task(worker, step, shape);
  if (task.rows.all == 0) return;
  if (shape.depthwise) return task.run_depthwise();
  const bool winograd = task.use_winograd();
  if (!shape.small) return winograd ? task.fresh_winograd() : task.fresh_direct();
  task.mix_shared(winograd);
  if (winograd) task.shared_winograd();
  else task.shared_direct();
}

void step_channel_fusion(Worker&, const Step&) {}
