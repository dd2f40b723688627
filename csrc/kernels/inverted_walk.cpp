// Hidden pixels of a fused inverted residual: expanded into a ring, convolved from there.

#include "inverted_walk.h"

#include <cstring>

#include "mixing.h"
#include "pixel_sums.h"

namespace inverted {

namespace {

// A missing kernel row is null in bfloat16 and left out in float32.
template <typename T>
constexpr bool kAllLines = sizeof(T) == 2;

constexpr int64_t kRingBytes = 400 << 10;  // of the ring and of the buffer behind the depthwise convolution
constexpr int64_t kBareRingBytes = 128 << 10;  // without a projection: the result is read soon, and should stay in the cache
constexpr int64_t kLightBytes = 32 << 10;      // of weights that a band may read again
constexpr int kMostBand = 16;              // output rows

bool is_factored(const FusedExpansion& fusion) { return fusion.rank && !fusion.folded; }

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

template <typename T>
Layout<T>::Layout(const InvertedArgsOf<T>& args, bool by_panels, int64_t own_channels) {
  panels = by_panels ? 1 : panels_of(args.hidden);
  span = int64_t{args.kernel[0] - 1} * args.dilation[0] + 1;
  left = args.padding[1];
  const int64_t reach = int64_t{args.out_width - 1} * args.stride[1] + int64_t{args.kernel[1] - 1} * args.dilation[1] + 1;
  const int64_t right = std::max<int64_t>(0, reach - left - args.width);
  pitch = args.width + std::max(left, right);
  // Rows that lie a multiple of 2 KiB apart would fight for the same lines of the L1 cache.
  hidden_stride = sizeof(T) == 4 ? args.hidden : panels_of(args.hidden) * kPanel;
  const int64_t threads = std::max(1, args.threads);
  if (!args.project_weight) hidden_stride = own_channels ? own_channels : args.out_stride;
  else if (by_panels && kOwnSums<T>) hidden_stride = (panels_of(args.hidden) + threads - 1) / threads * kPanel;
  if (args.project_weight && hidden_stride * sizeof(T) % 2048 == 0) hidden_stride += 64 / sizeof(T);
  band = by_panels ? args.out_height : args.band > 0 ? args.band : chosen_band(args);
  slots = (band - 1) * args.stride[0] + span;
  panel_size = (slots * pitch + left + right) * kPanel;
}

template <typename T>
int64_t Layout<T>::chosen_band(const InvertedArgsOf<T>& args) const {
  // Every band reads the weights anew.
  const bool light = args.channels * panels * kPanel * int64_t{sizeof(T)} <= kLightBytes;
  const int64_t elements = (!args.project_weight && light ? kBareRingBytes : kRingBytes) / int64_t{sizeof(T)};
  const int64_t row = pitch * panels * kPanel * args.stride[0] +
                      (args.project_weight ? args.out_width * hidden_stride : 0);
  const int64_t fits = (elements - pitch * panels * kPanel * span) / row;
  return std::max<int64_t>(1, std::min<int64_t>({fits, kMostBand, args.out_height}));
}

template <typename T>
Scratch<T>::Scratch(const InvertedArgsOf<T>& args, const Layout<T>& layout, void* base, T* shared, int64_t* bytes) {
  int64_t at = 0;
  const auto take = [&at, base](int64_t size) {
    char* from = base ? static_cast<char*>(base) + at : nullptr;
    at += rounded(size);
    return from;
  };
  const int64_t pixels = args.project_weight ? layout.band * args.out_width : 0, inputs = layout.slots * args.width;
  ring = reinterpret_cast<T*>(take(args.expand_weight ? layout.panels * layout.panel_size * sizeof(T) : 0));
  buffer = shared ? shared : reinterpret_cast<T*>(take(pixels * layout.hidden_stride * sizeof(T)));
  folded = reinterpret_cast<float*>(take(args.fusion.folded ? layout.panels * (args.channels + 1) * kPanel * sizeof(float) : 0));
  latents = reinterpret_cast<const void**>(take(is_factored(args.fusion) ? inputs * 8 : 0));
  means = reinterpret_cast<float*>(take(args.means ? panels_of(args.hidden) * kPanel * sizeof(float) : 0));
  expand.from = reinterpret_cast<const void**>(take(inputs * 8));
  expand.to = reinterpret_cast<void**>(take(inputs * 8));
  expand.add = nullptr;
  project.from = reinterpret_cast<const void**>(take(pixels * 8));
  project.to = reinterpret_cast<void**>(take(pixels * 8));
  project.add = reinterpret_cast<const void**>(take(pixels * 8));
  spans = reinterpret_cast<Span*>(take((layout.band * args.out_width / 2 + layout.band) * sizeof(Span)));
  if (bytes) *bytes = at;
}

void multiply(const List& list, int64_t from, int64_t to, int dtype, int64_t step, TileCall call, bool residual, Fetch fetch,
              Upcoming* upcoming) {
  const bool single = dtype != kFloat32;
  call.next.column = call.column;
  // All at once, where every tile is like the one before.
  if (!single && from < to && list.count % list.tiles() == 0 && (!upcoming || upcoming->empty())) {
    call.row_step = even_step(list.from + list.start(from), list.start(to) - list.start(from), step);
    if (call.row_step) call.more = static_cast<int>(to - from) - 1;
  }
  int64_t first = list.start(from);
  for (int64_t tile = from; tile < to; tile += call.more + 1) {
    const int64_t last = list.start(tile + 1);
    call.taps = list.from + first;
    call.out = list.to + first;
    call.residual = residual ? list.add + first : nullptr;
    if (!single && !call.more) call.row_step = even_step(call.taps, last - first, step);
    const bool more = tile + 1 < list.tiles() && !call.row_step;
    call.next.rows = more ? static_cast<int>(list.start(tile + 2) - last) : 0;
    call.next.taps = more && fetch == Fetch::kInputs ? list.from + last : nullptr;
    call.next.out = more && fetch == Fetch::kResults ? list.to + last : nullptr;
    if (upcoming) upcoming->give(call, single ? 2 : 4);
    gemm_tile(dtype, static_cast<int>(last - first), call.columns)(call);
    first = last;
  }
}

template <typename T>
bool HiddenWalk<T>::find_spans(int64_t first, int64_t last) {
  int64_t index = 0;
  spans_ = 0;
  for (int64_t y = first; y < last; ++y) {
    const int64_t row = image_ * args_.out_height + y;
    const uint8_t* need = args_.need ? args_.need + row * args_.out_width : nullptr;
    int32_t x = next_open(need, 0, args_.out_width);
    while (x < args_.out_width) {
      const int32_t end = next_closed(need, x, args_.out_width);
      // Without a projection the buffer is the result, which has room for closed pixels.
      scratch_.spans[spans_++] = {static_cast<int32_t>(y), x, end, args_.project_weight ? index : (y - first) * args_.out_width + x};
      index += end - x;
      x = next_open(need, end, args_.out_width);
    }
  }
  return spans_ > 0;
}

template <typename T>
void HiddenWalk<T>::hidden_band(int64_t first, int64_t last) {
  if (!args_.expand_weight) {
    for (int64_t i = 0; i < spans_; ++i) depthwise_span(scratch_.spans[i]);
    return;
  }
  find_hidden(first, last);
  for (int64_t panel = 0; panel < layout_.panels; ++panel) {
    expand_panel(panel, panel);
    for (int64_t i = 0; i < spans_; ++i) depthwise_panel(panel, panel, scratch_.spans[i]);
  }
}

template <typename T>
void HiddenWalk<T>::hidden_panels(int64_t first, int64_t last) {
  find_hidden(0, args_.out_height);
  for (int64_t panel = first; panel < last; ++panel) {
    expand_panel(panel, 0);
    for (int64_t i = 0; i < spans_; ++i) depthwise_panel(panel, 0, scratch_.spans[i]);
  }
}

// Lists the hidden pixels that the band needs and the ring lacks.
template <typename T>
void HiddenWalk<T>::find_hidden(int64_t first, int64_t last) {
  const int64_t low = std::max<int64_t>(0, first * args_.stride[0] - args_.padding[0]);
  const int64_t high = std::min<int64_t>(args_.height, (last - 1) * args_.stride[0] - args_.padding[0] + layout_.span);
  const int64_t width = args_.width, step = args_.in_stride;
  const void** const sources = scratch_.expand.from;
  void** const results = scratch_.expand.to;
  int64_t count = 0;
  for (int64_t y = std::max(low, ready_); y < high; ++y) {
    const int64_t row = (image_ * args_.height + y) * args_.width;
    const uint8_t* need = args_.need_hidden ? args_.need_hidden + row : nullptr;
    T* to = scratch_.ring + (y % layout_.slots * layout_.pitch + layout_.left) * kPanel;
    const T* from = args_.in + row * args_.in_stride;
    for (int64_t x = 0; x < width; ++x, to += kPanel, from += step) {
      // What is not needed is overwritten by the next.
      sources[count] = from;
      results[count] = to;
      count += need ? need[x] : 1;
    }
  }
  ready_ = std::max(ready_, high);
  scratch_.expand.count = count;
  if (is_factored(args_.fusion)) find_latents();
}

// The latent row of every pixel that is expanded.
template <typename T>
void HiddenWalk<T>::find_latents() const {
  const int64_t row = fusion_row(args_.fusion.rank);
  const float* const rows = factors() + panels_of(args_.hidden) * kPanel;
  const T* const image = args_.in + image_ * args_.height * args_.width * args_.in_stride;
  for (int64_t i = 0; i < scratch_.expand.count; ++i)
    scratch_.latents[i] = rows + (static_cast<const T*>(scratch_.expand.from[i]) - image) / args_.in_stride * row;
}

// A panel of static weights, scaled for this image, with what the latent rows give.
template <typename T>
void HiddenWalk<T>::expand_factored(int64_t panel, int64_t place) const {
  const FusedExpansion& fusion = args_.fusion;
  const float* scales[kMaxRows];
  std::fill_n(scales, kMaxRows, factors());
  TileCall call = panel_call(args_.expand_weight, args_.expand_bias, args_.channels, panel, args_.hidden);
  call.column = place * layout_.panel_size;
  call.activation = args_.activation[0];
  Blend blend{scales, panel * kPanel, nullptr, 0, fusion.rank, fusion.right + panel * fusion.rank * kPanel, fusion.offset + panel * kPanel};
  call.blend = &blend;
  const List& list = scratch_.expand;
  for (int64_t tile = 0; tile < list.tiles(); ++tile) {
    const int64_t first = list.start(tile), last = list.start(tile + 1);
    call.taps = list.from + first;
    call.out = list.to + first;
    call.row_step = even_step(call.taps, last - first, args_.in_stride);
    blend.taps = scratch_.latents + first;
    blend.row_step = call.row_step ? fusion_row(fusion.rank) : 0;
    if (args_.upcoming) args_.upcoming->give(call, sizeof(T));
    fetch_ahead(call, tile, list.tiles(), args_.channels * kPanel * int64_t{sizeof(float)});
    gemm_tile(kFloat32, static_cast<int>(last - first), call.columns)(call);
  }
}

template <typename T>
void HiddenWalk<T>::fold_panel(int64_t panel, int64_t place) const {
  const FusedExpansion& fold = args_.fusion;
  const float* const scale = factors();
  FuseCall call{};
  call.weights = reinterpret_cast<const float*>(args_.expand_bias) + panel * kPanel;
  call.rows = 1;
  call.shares = scale + panel * kPanel;
  call.left = scale + panels_of(args_.hidden) * kPanel;
  call.left_row = fusion_row(fold.rank);
  call.rank = fold.rank;
  call.right = fold.right + panel * fold.rank * kPanel;
  call.out = folded(place);
  mix_kernels().fuse(call);
  for (int64_t c = 0; c < kPanel; ++c) call.out[c] += fold.offset[panel * kPanel + c];
  call.weights = reinterpret_cast<const float*>(args_.expand_weight) + panel * args_.channels * kPanel;
  call.rows = args_.channels;
  call.left += call.left_row;
  call.out += kPanel;
  mix_kernels().fuse(call);
}

template <typename T>
void HiddenWalk<T>::expand_panel(int64_t panel, int64_t place) const {
  TileCall call = panel_call(args_.expand_weight, args_.expand_bias, args_.channels, panel, args_.hidden);
  if constexpr (sizeof(T) == 4) {
    if (is_factored(args_.fusion)) return expand_factored(panel, place);
    if (args_.fusion.folded) {
      // Cut by hidden channels, a panel is folded when its turn comes.
      if (layout_.panels == 1) fold_panel(panel, 0);
      call.bias = folded(layout_.panels == 1 ? 0 : panel);
      call.weight = call.bias + kPanel;
    }
  }
  call.column = place * layout_.panel_size;
  call.activation = args_.activation[0];
  // Every panel but the first finds the inputs in the cache.
  const Fetch fetch = panel == 0 ? Fetch::kInputs : Fetch::kNothing;
  multiply(scratch_.expand, 0, scratch_.expand.tiles(), kDtypeOf<T>, args_.in_stride, call, false, fetch, args_.upcoming);
}

template <typename T>
void HiddenWalk<T>::depthwise_panel(int64_t panel, int64_t place, const Span& span) const {
  const T* lines[kMostTaps];
  DepthwiseRunOf<T> run{};
  const int64_t top = int64_t{span.y} * args_.stride[0] - args_.padding[0];
  int first = 0;
  for (int i = 0; i < args_.kernel[0]; ++i) {
    const int64_t y = top + i * args_.dilation[0];
    if (y < 0) first = i + 1;
    if (y < 0 || y >= args_.height) {
      if (kAllLines<T>) lines[run.line_count++] = nullptr;
      continue;
    }
    lines[run.line_count++] = scratch_.ring + place * layout_.panel_size +
                              (y % layout_.slots * layout_.pitch + span.first * args_.stride[1]) * kPanel;
  }
  run.lines = lines;
  run.pixel = kPanel;
  run.channels = std::min<int64_t>(kPanel, args_.hidden - panel * kPanel);
  run.weight = args_.depthwise_weight;
  run.weight += kAllLines<T> ? 2 * panel * kPanel * depthwise_pairs(args_.kernel[0], args_.kernel[1])
                             : int64_t{first} * args_.kernel[1] * args_.hidden + panel * kPanel;
  run.weight_stride = args_.hidden;
  run.bias = args_.depthwise_bias + panel * kPanel;
  run.out = scratch_.buffer + span.index * layout_.hidden_stride + (panel - first_panel_) * kPanel;
  run.out_pixel = layout_.hidden_stride;
  run.count = span.last - span.first;
  run.kernel = args_.kernel[1];
  run.stride = args_.stride[1];
  run.dilation = args_.dilation[1];
  run.activation = args_.activation[1];
  depthwise_run(run);
  if constexpr (sizeof(T) == 4)
    if (args_.means) add_span(span, run, scratch_.means + panel * kPanel);
}

// The pixels of a span that the mean is taken over.
template <typename T>
void HiddenWalk<T>::add_span(const Span& span, const DepthwiseRun& run, float* sums) const {
  const int64_t row = image_ * args_.out_height + span.y;
  const uint8_t* counted = args_.counted ? args_.counted + row * args_.out_width : nullptr;
  for (int32_t x = next_open(counted, span.first, span.last); x < span.last;) {
    const int32_t end = next_closed(counted, x, span.last);
    add_pixels(run.out + (x - span.first) * run.out_pixel, end - x, run.out_pixel, run.channels, sums);
    x = next_open(counted, end, span.last);
  }
}

template <typename T>
void HiddenWalk<T>::depthwise_span(const Span& span) const {
  DepthwiseArgsOf<T> own{};
  own.images = args_.images;
  own.height = args_.height;
  own.width = args_.width;
  own.out_height = args_.out_height;
  own.out_width = args_.out_width;
  own.channels = args_.hidden;
  for (int i = 0; i < 2; ++i) {
    own.kernel[i] = args_.kernel[i];
    own.stride[i] = args_.stride[i];
    own.padding[i] = args_.padding[i];
    own.dilation[i] = args_.dilation[i];
  }
  own.in = args_.in;
  own.in_stride = args_.in_stride;
  own.weight = args_.depthwise_weight;
  own.bias = args_.depthwise_bias;
  own.activation = args_.activation[1];
  own.zeros = args_.zeros;
  depthwise_pixels(own, image_ * args_.out_height + span.y, span.first, span.last,
                   scratch_.buffer + span.index * layout_.hidden_stride, layout_.hidden_stride);
}

template <typename T>
void clear_borders(const Layout<T>& layout, T* ring, int64_t width, int64_t panels) {
  constexpr int64_t kPixelBytes = kPanel * int64_t{sizeof(T)};
  for (int64_t panel = 0; panel < panels; ++panel) {
    T* const start = ring + panel * layout.panel_size;
    std::memset(start, 0, layout.left * kPixelBytes);
    for (int64_t slot = 0; slot < layout.slots; ++slot) {
      const int64_t from = slot * layout.pitch + layout.left + width;
      const int64_t to = std::min((slot + 1) * layout.pitch + layout.left, layout.panel_size / kPanel);
      std::memset(start + from * kPanel, 0, (to - from) * kPixelBytes);
    }
  }
}

template struct Layout<float>;
template struct Layout<Bfloat16>;
template struct Scratch<float>;
template struct Scratch<Bfloat16>;
template class HiddenWalk<float>;
template class HiddenWalk<Bfloat16>;
template void clear_borders(const Layout<float>&, float*, int64_t, int64_t);
template void clear_borders(const Layout<Bfloat16>&, Bfloat16*, int64_t, int64_t);

}  // namespace inverted
