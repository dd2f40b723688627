// Weights of one panel and a few images. Source: CondConv, arXiv 1904.04971, equation 1; with coefficients for every output
// DyNet's (OpenReview SyeZIkrKwS, equation 1), with scales ODConv's (arXiv 2209.07947, equation 4); channel fusion is DCD's
// (arXiv 2103.08756, equation 6).

#include "panels.h"

#include <cstring>

namespace {

constexpr int64_t kChunkBytes = 800 << 10;   // of a chunk's experts and what is mixed of them, to stay in the L2 cache
constexpr float kOnes[kPanel] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
constexpr int64_t kSmallBytes = 1280 << 10;  // of an image's mixed weights, to stay in the caches of all threads

}  // namespace

void RowsTimesPanels::multiply() const {
  const void* taps[kMaxRows];
  void* outs[kMaxRows];
  TileCall call{};
  call.taps = taps;
  call.taps_count = 1;
  call.channels = depth;
  call.out = outs;
  call.residual = add ? outs : nullptr;
  for (int64_t first = 0; first < count; first += kMaxRows) {
    const int here = static_cast<int>(std::min<int64_t>(kMaxRows, count - first));
    for (int r = 0; r < here; ++r) {
      taps[r] = rows + (first + r) * row;
      outs[r] = out + (first + r) * out_row;
    }
    for (int64_t column = 0; column < columns; column += kPanel) {
      call.weight = weight + column * depth;
      call.bias = bias ? bias + column : kNoBias;
      call.column = column;
      call.columns = static_cast<int>(std::min<int64_t>(kPanel, columns - column));
      gemm_tile(kFloat32, here, call.columns)(call);
    }
  }
}

PanelShape::PanelShape(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  outputs = conv.out_channels / conv.groups;
  channels = conv.in_channels / conv.groups;
  taps = int64_t{conv.kernel[0]} * conv.kernel[1];
  count = step.ints[0];
  depthwise = outputs == 1 && channels == 1 && conv.groups > 1;
  if (depthwise) outputs = conv.out_channels;
  per_group = (outputs + kPanel - 1) / kPanel;
  panels = depthwise ? per_group : per_group * conv.groups;
  winograd = step.ints[2] != 0;
  rank = step.kind == kChannelFusion ? plan.convs[step.conv[1]].out_channels : 0;
  small = panels * panel_floats(channels) * 4 <= kSmallBytes;
  const int64_t fits = std::max<int64_t>(16, kChunkBytes / (kPanel * 4 * (taps * count + kMostMixed * points())));
  const int64_t chunks = (channels + fits - 1) / fits;
  chunk = std::min(channels, ((channels + chunks - 1) / chunks + 3) / 4 * 4);
  // Taps that lie a multiple of 4 KiB apart would fight for the same lines of the cache.
  if (chunk < channels && taps > 1 && chunk % 32 == 0) chunk = std::min(channels, chunk + 4);
}

int64_t PanelShape::scratch_floats() const {
  const int64_t rows = chunk * taps, fused = rank ? rank * kPanel + (winograd ? rows * kPanel : 0) : 0;
  return int64_t{kMostMixed} * (count * kPanel + rows) + 2 * rows + fused + 64;
}

PanelMixer::PanelMixer(const Run& run, const Step& step, const PanelShape& shape, const Prepared& prepared, float* scratch)
    : run_(run), step_(step), shape_(shape), prepared_(prepared), conv_(run.conv(step.conv[0])) {
  const int64_t rows = shape.chunk * shape.taps;
  places_ = reinterpret_cast<int64_t*>(scratch);
  shares_ = scratch + 2 * rows;
  scale_ = shares_ + int64_t{kMostMixed} * shape.count * kPanel;
  right_ = scale_ + int64_t{kMostMixed} * rows;
  fused_ = right_ + shape.rank * kPanel;
}

void PanelMixer::take_shares(int64_t panel, int64_t image, float* shares, bool scaled) const {
  if (shape_.rank) {
    std::memcpy(shares, prepared_.scale + image * prepared_.scale_step + panel * kPanel, kPanel * sizeof(float));
    return;
  }
  const float* from = row(step_.aux[0], image);
  const float* scale = scaled ? row(step_.aux[3], image) : nullptr;
  const int64_t first = shape_.first_output(panel);
  const int columns = shape_.columns(panel);
  for (int e = 0; e < shape_.count; ++e, shares += kPanel) {
    for (int c = 0; c < kPanel; ++c) {
      const int64_t o = first + std::min(c, columns - 1);
      const float share = !from ? 1.0f : step_.ints[1] ? from[o * shape_.count + e] : from[e];
      shares[c] = share * (scale ? scale[o] : 1.0f);
    }
  }
}

const float* PanelMixer::take_scale(int64_t panel, int64_t image, int images, int64_t first, int64_t channels) {
  if (shape_.rank || (step_.aux[1] < 0 && step_.aux[2] < 0)) return nullptr;
  // A depthwise kernel's input channels are its outputs, whose scale is among the shares.
  const int64_t start = shape_.depthwise ? 0 : panel / shape_.per_group * shape_.channels + first;
  float* to = scale_;
  for (int i = 0; i < images; ++i) {
    const float *taps = row(step_.aux[1], image + i), *own = row(step_.aux[2], image + i);
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t t = 0; t < shape_.taps; ++t) *to++ = (taps ? taps[t] : 1.0f) * (own ? own[start + k] : 1.0f);
  }
  return scale_;
}

const int64_t* PanelMixer::take_places(int64_t channels, int64_t step) {
  if (shape_.taps == 1) return nullptr;
  if (channels != placed_channels_ || step != placed_step_) {
    int64_t* to = places_;
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t t = 0; t < shape_.taps; ++t) *to++ = t * step + k * kPanel;
    placed_channels_ = channels;
    placed_step_ = step;
  }
  return places_;
}

void PanelMixer::mix(int64_t panel, int64_t image, int images, int64_t first, int64_t channels, const PanelPlace& place,
                     bool cold) {
  const int64_t row_floats = int64_t{shape_.count} * kPanel;
  if (shape_.rank && shape_.taps == 1) {
    for (int i = 0; i < images; ++i) fuse_point(panel, image + i, first, channels, place.out + i * place.image_step);
    return;
  }
  for (int i = 0; i < images; ++i) take_shares(panel, image + i, shares_ + i * row_floats, true);
  MixCall call{};
  call.experts = static_cast<const float*>(conv_.weight) + (panel * shape_.channels + first) * shape_.taps * row_floats;
  call.rows = channels * shape_.taps;
  if (cold) bring_near(call.experts, call.rows * row_floats);
  call.count = shape_.count;
  call.shares = shares_;
  call.images = images;
  call.scale = take_scale(panel, image, images, first, channels);
  call.out = place.out;
  call.image_step = place.image_step;
  if (place.winograd && shape_.rank) {
    fuse(call, panel, image, first, channels, place);
  } else if (place.winograd) {
    call.point_step = place.step;
    mix_kernels().mix_winograd(call);
  } else {
    call.places = take_places(channels, place.step);
    mix_kernels().mix(call);
    const int64_t centre = (conv_.kernel[0] / 2) * conv_.kernel[1] + conv_.kernel[1] / 2;
    if (shape_.rank)
      for (int i = 0; i < images; ++i)
        add_low_rank(panel, image + i, first, channels, place.out + i * place.image_step + centre * place.step, kPanel);
  }
}

// The low-rank part belongs to a tap, so it is added before the transform.
void PanelMixer::fuse(MixCall& call, int64_t panel, int64_t image, int64_t first, int64_t channels, const PanelPlace& place) {
  MixCall direct = call;
  direct.images = 1;
  direct.out = fused_;
  MixCall points = direct;
  points.experts = fused_;
  points.shares = kOnes;
  points.point_step = place.step;
  for (int i = 0; i < call.images; ++i, direct.shares += kPanel) {
    mix_kernels().mix(direct);
    add_low_rank(panel, image + i, first, channels, fused_ + 4 * kPanel, 9 * kPanel);
    points.out = place.out + i * place.image_step;
    mix_kernels().mix_winograd(points);
  }
}

// All of a 1x1 kernel at once.
void PanelMixer::fuse_point(int64_t panel, int64_t image, int64_t first, int64_t channels, float* out) {
  FuseCall call{};
  call.weights = static_cast<const float*>(conv_.weight) + (panel * shape_.channels + first) * kPanel;
  call.rows = channels;
  call.shares = prepared_.scale + image * prepared_.scale_step + panel * kPanel;
  call.left = prepared_.left + image * prepared_.left_step + first * prepared_.left_row;
  call.left_row = prepared_.left_row;
  call.rank = shape_.rank;
  call.right = right_of(panel, image);
  call.out = out;
  mix_kernels().fuse(call);
}

// out[k * step] += left[first + k] * right, a row of the panel for each channel.
void PanelMixer::add_low_rank(int64_t panel, int64_t image, int64_t first, int64_t channels, float* out, int64_t step) {
  const float* left = prepared_.left + image * prepared_.left_step + first * prepared_.left_row;
  const int64_t rank = shape_.rank;
  RowsTimesPanels{left, channels, prepared_.left_row, rank, right_of(panel, image), kPanel, out, step, nullptr, true}.multiply();
}

const float* PanelMixer::right_of(int64_t panel, int64_t image) {
  const float* right = prepared_.right + panel * shape_.rank * kPanel;
  if (!prepared_.matrix) return right;
  const float* matrix = prepared_.matrix + image * prepared_.matrix_step;
  RowsTimesPanels{matrix, shape_.rank, shape_.rank, shape_.rank, right, kPanel, right_, kPanel}.multiply();
  return right_;
}

void PanelMixer::bias(int64_t panel, int64_t image, float* out) {
  std::memcpy(out, conv_.bias + panel * kPanel, kPanel * sizeof(float));
  if (shape_.rank == 0 && step_.conv[1] < 0) return;
  take_shares(panel, image, shares_, false);
  float mixed[kPanel];
  if (shape_.rank) {
    const void* taps[kMaxRows] = {prepared_.shift + image * prepared_.shift_step};
    void* outs[kMaxRows] = {mixed};
    TileCall call{};
    call.taps = taps;
    call.taps_count = 1;
    call.channels = shape_.rank;
    call.weight = prepared_.right + panel * shape_.rank * kPanel;
    call.bias = prepared_.offset + panel * kPanel;
    call.out = outs;
    call.columns = kPanel;
    gemm_tile(kFloat32, 1, kPanel)(call);
    for (int c = 0; c < kPanel; ++c) out[c] = out[c] * shares_[c] + mixed[c];
    return;
  }
  MixCall call{};
  call.experts = static_cast<const float*>(run_.conv(step_.conv[1]).weight) + panel * shape_.count * kPanel;
  call.rows = 1;
  call.count = shape_.count;
  call.shares = shares_;
  call.images = 1;
  call.out = mixed;
  mix_kernels().mix(call);
  for (int c = 0; c < kPanel; ++c) out[c] += mixed[c];
}
