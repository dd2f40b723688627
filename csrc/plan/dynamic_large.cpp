// Dynamic convolutions whose mixed weights exceed the caches: mixed in chunks and used at once, image after image.

#include "dynamic_task.h"
#include "winograd_tiles.h"

// f(first image, one past the last) for as many images as the sums have room for.
template <typename F>
void DynamicTask::image_blocks(int64_t floats_of_image, F&& f) const {
  const int64_t fit = std::max<int64_t>(1, sums_floats(shape_, out_) / std::max<int64_t>(1, floats_of_image));
  for (int64_t image = 0; image < images_; image += fit) f(image, std::min(images_, image + fit));
}

// f(first channel, channels, first image, images) for chunks of channels and groups of images whose weights are mixed.
template <typename F>
void DynamicTask::chunks(PanelMixer& own, int64_t panel, int64_t first_image, int64_t last_image, bool winograd, F&& f) const {
  const int64_t groups = ceil_of(last_image - first_image, kMostMixed);
  for (int64_t first = 0; first < shape_.channels; first += shape_.chunk) {
    const int64_t channels = std::min(shape_.chunk, shape_.channels - first);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t image = first_image + group * kMostMixed;
      const int count = static_cast<int>(std::min<int64_t>(kMostMixed, last_image - image));
      const int64_t point_step = channels * kPanel + (winograd ? kPanel : 0);
      own.mix(panel, image, count, first, channels,
              {scratch_.weights, shape_.panel_floats(shape_.chunk), point_step, winograd}, group == 0);
      foresee(panel, first + channels, group, groups);
      f(first, channels, image, count);
    }
  }
}

// The experts of the chunk from `first` on come from memory while the chunk before it multiplies, a part of them with every
// group of images: what comes long before it is used has left the cache by then.
void DynamicTask::foresee(int64_t panel, int64_t first, int64_t group, int64_t groups) const {
  worker_.upcoming = {};
  const int64_t row = shape_.taps * shape_.count * kPanel, from = panel * shape_.channels + first;
  const int64_t end = std::min(from + shape_.chunk, shape_.panels * shape_.channels);
  const int64_t start = from + (end - from) * group / groups, stop = from + (end - from) * (group + 1) / groups;
  worker_.upcoming.add(static_cast<const float*>(conv_.weight) + start * row, (stop - start) * row * 4);
}

void DynamicTask::large_direct() const {
  const ConvRows place(run_, step_, worker_.zeros);
  const int64_t most = rows_.most(images_);
  const bool once = shape_.chunk == shape_.channels;
  worker_.share(shape_.panels, [&](int64_t panel) {
    PanelMixer own = mixer();
    image_blocks(once ? 1 : most * kPanel, [&](int64_t begin, int64_t end) {
      chunks(own, panel, begin, end, false, [&](int64_t first, int64_t channels, int64_t image, int count) {
        for (int i = 0; i < count; ++i) {
          own.bias(panel, image + i, scratch_.bias);
          float* sums = scratch_.sums + (image + i - begin) * most * kPanel;
          multiply(place, panel, image + i, scratch_.weights + i * shape_.panel_floats(shape_.chunk), first, channels,
                   once ? nullptr : sums);
        }
      });
      if (once) return;
      for (int64_t image = begin; image < end; ++image)
        finish(place, panel, image, scratch_.sums + (image - begin) * most * kPanel);
    });
  });
}

// All rows of an image by the weights of some channels; into the result, or added to sums.
void DynamicTask::multiply(const ConvRows& place, int64_t panel, int64_t image, const float* weight, int64_t first_channel,
                           int64_t channels, float* sums) const {
  const int64_t count = rows_.count(image), first = rows_.first(image), most = kMostTiles * kMaxRows;
  TileCall call = tile_call(panel);
  call.channels = channels;
  call.tap_offset += first_channel;
  call.weight = weight;
  call.bias = first_channel ? kNoBias : scratch_.bias;
  if (sums) {
    call.column = 0;
    call.columns = kPanel;
    call.activation = call.final_activation = kNone;
  }
  for (int64_t from = 0; from < count; from += most) {
    const RowTable table = place.table(scratch_.rest, rows_.list, first + from, std::min(most, count - from));
    for (int64_t tile = 0; tile < table.tiles; ++tile) {
      table.point(call, tile);
      worker_.upcoming.give(call, sizeof(float));
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

void DynamicTask::finish(const ConvRows& place, int64_t panel, int64_t image, const float* sums) const {
  const int64_t count = rows_.count(image), first = rows_.first(image), most = kMostTiles * kMaxRows;
  const int64_t column = shape_.first_output(panel);
  for (int64_t from = 0; from < count; from += most) {
    const RowTable table = place.table(scratch_.rest, rows_.list, first + from, std::min(most, count - from));
    for (int64_t tile = 0; tile < table.tiles; ++tile) {
      for (int r = 0; r < table.rows_of(tile); ++r) {
        const int64_t at = tile * kMaxRows + r;
        const auto* add = table.adds ? static_cast<const float*>(table.adds[at]) + column : nullptr;
        winograd_kernels().finish(sums + (from + table.first_of(tile) + r) * kPanel, shape_.columns(panel),
                                  step_.activation[0], step_.final_activation, add,
                                  static_cast<float*>(table.outs[at]) + column);
      }
    }
  }
}

// Chunks one after the other, each [images][points][tiles][channels].
void DynamicTask::transform_inputs() const {
  const WinogradTiles place(run_, step_, tiles_.list, worker_.zeros);
  constexpr int64_t kBlock = 4;
  const int64_t blocks = ceil_of(tiles_.most(images_), kBlock), positions = kWinogradPoints * tiles_.area;
  worker_.share(images_ * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, count = tiles_.count(image), start = tiles_.first(image);
    for (int64_t t = task % blocks * kBlock; t < std::min(count, (task % blocks + 1) * kBlock); ++t) {
      const Position at = place.tile(start + t);
      for (int64_t first = 0; first < shape_.channels; first += shape_.chunk) {
        const int64_t channels = std::min(shape_.chunk, shape_.channels - first);
        float* own = shared_ + positions * (images_ * first + image * channels);
        place.transform(at, first, channels, own + t * channels, count * channels);
      }
    }
  });
  worker_.barrier();
}

void DynamicTask::large_winograd() const {
  transform_inputs();
  const WinogradTiles place(run_, step_, tiles_.list, worker_.zeros);
  const int64_t positions = kWinogradPoints * tiles_.area, image_sums = kWinogradPoints * tiles_.most(images_) * kPanel;
  worker_.share(shape_.panels, [&](int64_t panel) {
    PanelMixer own = mixer();
    image_blocks(image_sums, [&](int64_t begin, int64_t end) {
      chunks(own, panel, begin, end, true, [&](int64_t first, int64_t channels, int64_t image, int count) {
        for (int i = 0; i < count; ++i) {
          const int64_t here = tiles_.count(image + i);
          WinogradProducts{shared_ + positions * (images_ * first + (image + i) * channels), here * channels, channels, here,
                           scratch_.weights + i * shape_.panel_floats(shape_.chunk), channels * kPanel + kPanel, channels,
                           scratch_.sums + (image + i - begin) * image_sums, first > 0, kFloat32, &worker_.upcoming, true}.run();
        }
      });
      for (int64_t image = begin; image < end; ++image) {
        own.bias(panel, image, scratch_.bias);
        const float* products = scratch_.sums + (image - begin) * image_sums;
        const int64_t here = tiles_.count(image), first = tiles_.first(image);
        for (int64_t t = 0; t < here; ++t)
          place.finish(place.tile(first + t), products + t * kPanel, here * kPanel, scratch_.bias, panel);
      }
    });
  });
}
