// What all ways of running a dynamic convolution share, small mixed weights, and depthwise ones.

#include "dynamic_task.h"

#include <cstring>

#include "winograd_tiles.h"

namespace {

constexpr int64_t kSumsBytes = 1 << 20;  // of the sums of a panel over chunks, for as many images as fit
// Of positions that a Winograd tile must save to be worth its transforms, and an image those of its weights.
constexpr double kTilePositions = 2.3;
constexpr double kTransformPositions = 5;

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

}  // namespace

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

DynamicTask::DynamicTask(Worker& worker, const Step& step, const PanelShape& shape, const Prepared& prepared, char* shared)
    : worker_(worker), run_(worker.run), step_(step), shape_(shape), prepared_(prepared), conv_(run_.conv(step.conv[0])),
      out_(run_.value(step.out)), images_(run_.call.images), shared_(reinterpret_cast<float*>(shared)),
      scratch_(worker.scratch, shape, sums_floats(shape, out_)), rows_(rows_of(run_, step)) {
  if (shape.winograd) tiles_ = tiles_of(run_, step, rows_);
}

int64_t DynamicTask::sums_floats(const PanelShape& shape, const Value& out) {
  if (shape.depthwise) return shape.taps * kPanel;
  if (shape.small) return shape.winograd ? kWinogradPoints * kMostWinogradTiles * (winograd_row(shape.channels) + kPanel) : 0;
  const int64_t rows = int64_t{out.height} * out.width;
  const int64_t of_image = kPanel * (shape.winograd ? std::max(rows, kWinogradPoints * tiles_of_image(out)) : rows);
  return std::max<int64_t>(kSumsBytes / 4, of_image);
}

int64_t DynamicTask::shared_bytes(const Plan& plan, const Step& step, const PanelShape& shape, int64_t images) {
  const Conv& conv = plan.convs[step.conv[0]];
  if (shape.depthwise) return images * (shape.taps + 1) * conv.out_channels * 4 + kSlack;
  if (shape.small) return images * shape.panels * (shape.panel_floats(shape.channels) + kPanel) * 4 + kSlack;
  if (!shape.winograd) return kSlack;
  return images * kWinogradPoints * tiles_of_image(plan.values[step.out]) * shape.channels * 4 + kSlack;
}

bool DynamicTask::use_winograd() const {
  if (!shape_.winograd || step_.closed) return false;
  return double(tiles_.all) * kTilePositions + kTransformPositions * images_ < double(rows_.all);
}

void DynamicTask::run() const {
  if (rows_.all == 0) return;
  if (shape_.depthwise) return depthwise();
  const bool winograd = use_winograd();
  if (!shape_.small) return winograd ? large_winograd() : large_direct();
  mix_all(winograd);
  if (winograd) small_winograd();
  else small_direct();
}

TileCall DynamicTask::tile_call(int64_t panel) const {
  TileCall call{};
  call.taps_count = static_cast<int>(shape_.taps);
  call.channels = shape_.channels;
  call.tap_offset = panel / shape_.per_group * shape_.channels;
  call.column = shape_.first_output(panel);
  call.columns = shape_.columns(panel);
  call.activation = step_.activation[0];
  call.final_activation = step_.final_activation;
  return call;
}

void DynamicTask::mix_all(bool winograd) const {
  const int64_t groups = ceil_of(images_, kMostMixed), needed = ceil_of(shape_.channels, shape_.chunk);
  const int64_t wanted = ceil_of(4 * worker_.threads, shape_.panels * groups);
  const int64_t splits = std::max(needed, std::min(wanted, shape_.channels / 16));
  const int64_t image_step = shape_.panels * shape_.panel_floats(shape_.channels);
  const int64_t point_step = shape_.channels * kPanel + (winograd ? kPanel : 0);
  worker_.share(shape_.panels * groups * splits, [&](int64_t task) {
    const int64_t split = task % splits, panel = task / splits % shape_.panels;
    const int64_t image = task / splits / shape_.panels * kMostMixed;
    const int count = static_cast<int>(std::min<int64_t>(kMostMixed, images_ - image));
    const int64_t first = shape_.channels * split / splits, last = shape_.channels * (split + 1) / splits;
    PanelMixer own = mixer();
    own.mix(panel, image, count, first, last - first,
            {shared_weights(image, panel) + first * kPanel, image_step, point_step, winograd}, true);
    if (split == 0)
      for (int i = 0; i < count; ++i) own.bias(panel, image + i, shared_bias(image + i, panel));
  });
  worker_.barrier();
}

void DynamicTask::small_direct() const {
  const int64_t depth = shape_.taps * shape_.channels, most = rows_.most(images_);
  const int64_t touched = shape_.taps == 1 ? 1 : int64_t{conv_.stride[0]} * conv_.stride[1];
  const Cut all = cut(most, run_.value(step_.in).stride * 4 * touched, shape_.panels, depth * kPanel * 4,
                      double(depth) * std::min<int64_t>(kPanel, shape_.outputs),
                      images_ >= 4 * worker_.threads ? 1 : worker_.threads);
  const ConvRows place(run_, step_, worker_.zeros);
  worker_.share(images_ * all.tasks(), [&](int64_t forward) {
    const int64_t task = worker_.backward(forward, images_ * all.tasks());
    const int64_t image = task / all.tasks(), block = task % all.row_blocks, group = task % all.tasks() / all.row_blocks;
    Cut own = all;
    own.rows = rows_.count(image);
    const int64_t first = own.first_row(block), count = own.first_row(block + 1) - first;
    if (count <= 0) return;
    const RowTable table = place.table(scratch_.rest, rows_.list, rows_.first(image) + first, count);
    for (int64_t panel = own.first_panel(group); panel < own.first_panel(group + 1); ++panel) {
      TileCall call = tile_call(panel);
      call.weight = shared_weights(image, panel);
      call.bias = shared_bias(image, panel);
      for (int64_t tile = 0; tile < table.tiles; ++tile) {
        table.point(call, tile);
        worker_.upcoming.give(call, sizeof(float));
        gemm_tile(kFloat32, table.rows_of(tile), call.columns)(call);
      }
    }
  });
}

void DynamicTask::small_winograd() const {
  const WinogradTiles place(run_, step_, tiles_.list, worker_.zeros);
  const int64_t channels = shape_.channels, row = winograd_row(channels), most = winograd_tiles_of_task(channels);
  const int64_t largest = tiles_.most(images_), threads = worker_.threads;
  int64_t blocks = ceil_of(largest, most), groups = 1;
  if (threads > 1 && images_ * blocks < 4 * threads && largest >= 2 * kMaxRows * threads)
    blocks = std::max<int64_t>(ceil_of(blocks, threads) * threads, threads);
  else if (images_ * blocks < 2 * threads)
    groups = std::min(shape_.panels, 2 * threads);
  worker_.share(images_ * blocks * groups, [&](int64_t task) {
    const int64_t image = task / (blocks * groups), block = task % blocks, group = task / blocks % groups;
    const int64_t own = tiles_.count(image), from = own * block / blocks, count = own * (block + 1) / blocks - from;
    if (count <= 0) return;
    const int64_t first = tiles_.first(image) + from;
    float *transformed = scratch_.sums, *products = transformed + kWinogradPoints * count * row;
    for (int64_t t = 0; t < count; ++t) place.transform(place.tile(first + t), 0, channels, transformed + t * row, count * row);
    for (int64_t panel = shape_.panels * group / groups; panel < shape_.panels * (group + 1) / groups; ++panel) {
      WinogradProducts{transformed, count * row, row, count, shared_weights(image, panel), channels * kPanel + kPanel, channels,
                       products, false}.run();
      for (int64_t t = 0; t < count; ++t)
        place.finish(place.tile(first + t), products + t * kPanel, count * kPanel, shared_bias(image, panel), panel);
    }
  });
}

void DynamicTask::depthwise() const {
  const int64_t channels = conv_.out_channels, floats = (shape_.taps + 1) * channels;
  worker_.share(images_ * shape_.panels, [&](int64_t task) {
    const int64_t image = task / shape_.panels, panel = task % shape_.panels;
    float* const weight = shared_ + image * floats;
    PanelMixer own = mixer();
    own.mix(panel, image, 1, 0, 1, {scratch_.sums, 0, kPanel, false}, false);
    own.bias(panel, image, scratch_.bias);
    const int64_t bytes = shape_.columns(panel) * int64_t{sizeof(float)};
    for (int64_t t = 0; t < shape_.taps; ++t)
      std::memcpy(weight + t * channels + panel * kPanel, scratch_.sums + t * kPanel, bytes);
    std::memcpy(weight + shape_.taps * channels + panel * kPanel, scratch_.bias, bytes);
  });
  worker_.barrier();
  const DepthwiseArgs all = depthwise_args();
  const int64_t chunks = depthwise_chunks(all, worker_.threads), in_area = int64_t{all.height} * all.width;
  worker_.share(images_ * chunks, [&](int64_t task) {
    const int64_t image = task / chunks;
    DepthwiseArgs own = all;
    own.weight = shared_ + image * floats;
    own.bias = shared_ + image * floats + shape_.taps * channels;
    own.in += image * in_area * own.in_stride;
    own.out += image * rows_.area * own.out_stride;
    if (own.residual) own.residual += image * rows_.area * own.residual_stride;
    if (own.need) own.need += image * rows_.area;
    depthwise_run_chunk(own, chunks, task % chunks);
  });
}

// Of one image, without weights.
DepthwiseArgs DynamicTask::depthwise_args() const {
  const Value& in = run_.value(step_.in);
  DepthwiseArgs args{};
  args.images = 1;
  args.height = in.height;
  args.width = in.width;
  args.out_height = out_.height;
  args.out_width = out_.width;
  args.channels = out_.channels;
  for (int i = 0; i < 2; ++i) {
    args.kernel[i] = conv_.kernel[i];
    args.stride[i] = conv_.stride[i];
    args.padding[i] = conv_.padding[i];
    args.dilation[i] = conv_.dilation[i];
  }
  args.in = reinterpret_cast<const float*>(run_.data(step_.in));
  args.in_stride = in.stride;
  args.out = reinterpret_cast<float*>(run_.data(step_.out));
  args.out_stride = out_.stride;
  if (step_.in2 >= 0) {
    args.residual = reinterpret_cast<const float*>(run_.data(step_.in2));
    args.residual_stride = run_.value(step_.in2).stride;
  }
  args.activation = step_.activation[0];
  args.final_activation = step_.final_activation;
  args.need = run_.need(step_.grid, step_.run_all_above);
  args.zeros = worker_.zeros;
  return args;
}
