// The walk of the fused inverted residual over bands of rows, or over panels of hidden channels.

#include "inverted_residual.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../plan/plan.h"
#include "activations.h"
#include "depthwise.h"
#include "gemm.h"
#include "isa.h"
#include "mask_bytes.h"
#include "mixing.h"
#include "pixel_sums.h"
#include "rowwise.h"

namespace {

template <typename T>
constexpr int kDtypeOf = sizeof(T) == 4 ? kFloat32 : kBfloat16;
// A missing kernel row is null in bfloat16 and left out in float32.
template <typename T>
constexpr bool kAllLines = sizeof(T) == 2;

// Cut by hidden channels, every thread projects its own: then sums change hands and not the much larger hidden tensor.
template <typename T>
constexpr bool kOwnSums = sizeof(T) == 4;

constexpr int64_t kRingBytes = 400 << 10;  // of the ring and of the buffer behind the depthwise convolution
constexpr int64_t kBareRingBytes = 128 << 10;  // without a projection: the result is read soon, and should stay in the cache
constexpr int64_t kLightBytes = 32 << 10;      // of weights that a band may read again
constexpr int kMostBand = 16;              // output rows
constexpr int kFewRows = 8;                // so few that two threads would compute most hidden rows twice
constexpr int kMostRowsByPanels = 16;      // of an image that is cut by hidden channels

int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

bool is_factored(const FusedExpansion& fusion) { return fusion.rank && !fusion.folded; }

// Where things lie in a thread's scratch.
template <typename T>
struct Layout {
  int64_t panels;         // of hidden channels
  int64_t span;           // hidden rows that one output row reads
  int64_t slots, pitch;   // of the ring: rows, and pixels of a row with its border
  int64_t left;           // pixels of the border before a row
  int64_t panel_size;     // elements of the ring
  int64_t hidden_stride;  // of the buffer behind the depthwise convolution
  int64_t band;

  // By hidden channels the ring holds one panel of a whole image. own_channels: of the thread, where its results lie together.
  Layout(const InvertedArgsOf<T>& args, bool by_panels, int64_t own_channels = 0) {
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

  int64_t chosen_band(const InvertedArgsOf<T>& args) const {
    // Every band reads the weights anew.
    const bool light = args.channels * panels * kPanel * int64_t{sizeof(T)} <= kLightBytes;
    const int64_t elements = (!args.project_weight && light ? kBareRingBytes : kRingBytes) / int64_t{sizeof(T)};
    const int64_t row = pitch * panels * kPanel * args.stride[0] +
                        (args.project_weight ? args.out_width * hidden_stride : 0);
    const int64_t fits = (elements - pitch * panels * kPanel * span) / row;
    return std::max<int64_t>(1, std::min<int64_t>({fits, kMostBand, args.out_height}));
  }
};

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Pixels of up to a band as pointers, cut into tiles of nearly equal rows.
struct List {
  const void** from;
  void** to;
  const void** add;
  int64_t count;

  int64_t tiles() const { return (count + kMaxRows - 1) / kMaxRows; }
  int64_t start(int64_t tile) const { return tile == 0 ? 0 : count * tile / tiles(); }
};

// Open pixels of one output row that lie side by side.
struct Span {
  int32_t y, first, last;
  int64_t index;  // of the first pixel in the buffer behind the depthwise convolution
};

template <typename T>
struct Scratch {
  T* ring;
  T* buffer;  // behind the depthwise convolution
  List expand, project;
  Span* spans;
  float* means;  // sums of the rows in hand
  float* folded;
  const void** latents;  // of the pixels that are expanded

  Scratch(const InvertedArgsOf<T>& args, const Layout<T>& layout, void* base, T* shared, int64_t* bytes = nullptr) {
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
};

// What all tiles of a 1x1 convolution's panel share.
template <typename T>
TileCall panel_call(const T* weight, const float* bias, int64_t depth, int64_t panel, int64_t channels) {
  TileCall call{};
  call.taps_count = 1;
  call.channels = depth;
  call.weight = weight + panel * panel_elements(kDtypeOf<T>, 1, depth);
  call.bias = bias + panel * kPanel;
  call.columns = static_cast<int>(std::min<int64_t>(kPanel, channels - panel * kPanel));
  return call;
}

// What comes into the cache for the next tile while one multiplies, where its rows lie anywhere.
enum class Fetch { kNothing, kInputs, kResults };

// The tiles [from, to). `step`: elements from one row to the next, where none are nearer.
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

// One image in the hands of one thread.
template <typename T>
class Walk {
 public:
  Walk(const InvertedArgsOf<T>& args, const Layout<T>& layout, const Scratch<T>& scratch, int64_t image)
      : args_(args), layout_(layout), scratch_(scratch), image_(image) {}

  void band(int64_t first, int64_t last) {
    open_band(first, last);
    // What they get was read a moment ago.
    fill_closed(first, last);
  }

  // Gives the closed pixels of the rows [first, last) what was asked for.
  void fill_closed(int64_t first, int64_t last) const {
    if (!args_.fills || !args_.need) return;
    for (int64_t y = first; y < last; ++y) {
      const int64_t row = (image_ * args_.out_height + y) * args_.out_width;
      const uint8_t* need = args_.need + row;
      for (int32_t x = next_closed(need, 0, args_.out_width); x < args_.out_width;) {
        const int32_t end = next_open(need, x, args_.out_width);
        fill_span(row + x, end - x);
        x = next_closed(need, end, args_.out_width);
      }
    }
  }
  void fill_span(int64_t pixel, int64_t count) const {
    const RowKernels& kernels = row_kernels(kDtypeOf<T>);
    const T* from = args_.residual + pixel * args_.residual_stride;
    T* to = args_.out + pixel * args_.out_stride;
    const bool dense = args_.residual_stride == args_.out_channels && args_.out_stride == args_.out_channels;
    if (dense) return kernels.activate(from, count * args_.out_channels, args_.closed_activation, to);
    for (int64_t i = 0; i < count; ++i, from += args_.residual_stride, to += args_.out_stride)
      kernels.activate(from, args_.out_channels, args_.closed_activation, to);
  }

  void open_band(int64_t first, int64_t last) {
    const int64_t spans = find_spans(first, last);
    if (spans == 0) return;
    if (!args_.project_weight) scratch_.buffer = out_row(first);
    if (args_.expand_weight) {
      find_hidden(first, last);
      for (int64_t panel = 0; panel < layout_.panels; ++panel) {
        expand_panel(panel, panel);
        for (int64_t i = 0; i < spans; ++i) depthwise_panel(panel, panel, scratch_.spans[i]);
      }
    } else {
      for (int64_t i = 0; i < spans; ++i) depthwise_span(scratch_.spans[i]);
    }
    const int64_t outs = args_.project_weight ? panels_of(args_.out_channels) : 0;
    for (int64_t panel = 0; panel < outs; ++panel) project_panel(panel, 0, scratch_.project.tiles());
  }

  // The whole image, but only the hidden panels [first, last), as far as the buffer behind the depthwise convolution.
  void hidden_panels(int64_t first, int64_t last) {
    const int64_t spans = find_spans(0, args_.out_height);
    if (spans == 0) return;
    find_hidden(0, args_.out_height);
    first_panel_ = (kOwnSums<T> && args_.project_weight) || args_.slices ? first : 0;
    if (!args_.project_weight)
      scratch_.buffer = out_row(0) + (args_.slices ? first * kPanel * int64_t{args_.out_height} * args_.out_width : 0);
    for (int64_t panel = first; panel < last; ++panel) {
      expand_panel(panel, 0);
      for (int64_t i = 0; i < spans; ++i) depthwise_panel(panel, 0, scratch_.spans[i]);
    }
  }

  // The sums over the rows that were walked since the last call, of the hidden panels [first, last).
  void clear_means(int64_t first, int64_t last) const {
    if (args_.means) std::memset(scratch_.means + first * kPanel, 0, (last - first) * kPanel * sizeof(float));
  }
  void take_means(int64_t first, int64_t last, float factor, float* to) const {
    const int64_t end = std::min<int64_t>(last * kPanel, args_.hidden);
    for (int64_t c = first * kPanel; args_.means && c < end; ++c) to[c] = scratch_.means[c] * factor;
  }

  // What those panels add to the projection, one row of `sums` for each open pixel.
  void project_sums(int64_t first, int64_t last, float* sums, int64_t step) {
    for (int64_t i = 0; i < scratch_.project.count; ++i) scratch_.project.to[i] = sums + i * step;
    const int64_t depth = std::min<int64_t>(last * kPanel, args_.hidden) - first * kPanel;
    for (int64_t panel = 0; panel < panels_of(args_.out_channels); ++panel) {
      TileCall call = panel_call(args_.project_weight, args_.project_bias, args_.hidden, panel, args_.out_channels);
      call.weight = static_cast<const T*>(call.weight) + first * kPanel * kPanel;
      call.channels = depth;
      call.bias = kNoBias;
      call.column = panel * kPanel;
      multiply(scratch_.project, 0, scratch_.project.tiles(), kDtypeOf<T>, layout_.hidden_stride, call, false, Fetch::kNothing,
               args_.upcoming);
    }
  }

  // Closed pixels of the part `share` of an image's rows.
  void fill_share(int64_t share, int64_t shares) const {
    fill_closed(args_.out_height * share / shares, args_.out_height * (share + 1) / shares);
  }

  // Adds the sums of all threads up for the part `share` of the open pixels.
  void join_share(int64_t share, int64_t shares, const float* sums, int64_t step, int64_t part) {
    fill_share(share, shares);
    find_spans(0, args_.out_height);
    const int64_t count = scratch_.project.count;
    Join join{sums, part, shares, args_.project_bias, args_.out_channels, args_.activation[2], args_.final_activation, nullptr, nullptr};
    for (int64_t i = count * share / shares; i < count * (share + 1) / shares; ++i) {
      join.sums = sums + i * step;
      join_pixel(join, static_cast<const float*>(args_.residual ? scratch_.project.add[i] : nullptr),
                 static_cast<float*>(scratch_.project.to[i]));
    }
  }

  // The part `share` of `shares` of the projection of the whole image.
  void project_share(int64_t share, int64_t shares) {
    fill_share(share, shares);
    find_spans(0, args_.out_height);
    const int64_t panels = panels_of(args_.out_channels), tiles = scratch_.project.tiles();
    // Each thread should read as little as it can: a share of the weights, or of the pixels.
    if (args_.out_channels <= int64_t{args_.out_height} * args_.out_width) {
      for (int64_t panel = 0; panel < panels; ++panel)
        project_panel(panel, tiles * share / shares, tiles * (share + 1) / shares);
      return;
    }
    const int64_t first = panels * tiles * share / shares, last = panels * tiles * (share + 1) / shares;
    for (int64_t panel = 0; panel < panels; ++panel)
      project_panel(panel, std::max(first - panel * tiles, int64_t{0}), std::min(last - panel * tiles, tiles));
  }

  // Lists the open pixels of a band: spans for the depthwise convolution, pointers for the projection.
  int64_t find_spans(int64_t first, int64_t last) {
    int64_t spans = 0, index = 0;
    for (int64_t y = first; y < last; ++y) {
      const int64_t row = image_ * args_.out_height + y;
      const uint8_t* need = args_.need ? args_.need + row * args_.out_width : nullptr;
      int32_t x = next_open(need, 0, args_.out_width);
      while (x < args_.out_width) {
        const int32_t end = next_closed(need, x, args_.out_width);
        // Without a projection the buffer is the result, which has room for closed pixels.
        scratch_.spans[spans++] = {static_cast<int32_t>(y), x, end, args_.project_weight ? index : (y - first) * args_.out_width + x};
        if (args_.project_weight) list_span(row * args_.out_width + x, end - x, index);
        index += end - x;
        x = next_open(need, end, args_.out_width);
      }
    }
    scratch_.project.count = index;
    return spans;
  }

  // Pointers of `count` pixels from `pixel` on. Everything is a local, since a store of a pointer could change any member.
  void list_span(int64_t pixel, int64_t count, int64_t index) {
    const int64_t step = layout_.hidden_stride, out_step = args_.out_stride, add_step = args_.residual_stride;
    const void** const sources = scratch_.project.from + index;
    void** const results = scratch_.project.to + index;
    const void** const adds = scratch_.project.add + index;
    const T* from = scratch_.buffer + index * step;
    T* to = args_.out + pixel * out_step;
    for (int64_t i = 0; i < count; ++i, from += step, to += out_step) {
      sources[i] = from;
      results[i] = to;
    }
    if (!args_.residual) return;
    const T* add = args_.residual + pixel * add_step;
    for (int64_t i = 0; i < count; ++i, add += add_step) adds[i] = add;
  }

  // Lists the hidden pixels that the band needs and the ring lacks.
  void find_hidden(int64_t first, int64_t last) {
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

  const float* factors() const { return args_.fusion.factors + image_ * args_.fusion.factors_stride; }
  // The latent row of every pixel that is expanded.
  void find_latents() const {
    const int64_t row = fusion_row(args_.fusion.rank);
    const float* const rows = factors() + panels_of(args_.hidden) * kPanel;
    const T* const image = args_.in + image_ * args_.height * args_.width * args_.in_stride;
    for (int64_t i = 0; i < scratch_.expand.count; ++i)
      scratch_.latents[i] = rows + (static_cast<const T*>(scratch_.expand.from[i]) - image) / args_.in_stride * row;
  }
  // A panel of static weights, scaled for this image, with what the latent rows give.
  void expand_factored(int64_t panel, int64_t place) const {
    const FusedExpansion& fusion = args_.fusion;
    const float* scales[kMaxRows];
    std::fill_n(scales, kMaxRows, factors());
    TileCall call = panel_call(args_.expand_weight, args_.expand_bias, args_.channels, panel, args_.hidden);
    call.column = place * layout_.panel_size;
    call.activation = args_.activation[0];
    Blend blend{scales, panel * kPanel, nullptr, fusion.rank, fusion.right + panel * fusion.rank * kPanel, fusion.offset + panel * kPanel};
    call.blend = &blend;
    const List& list = scratch_.expand;
    for (int64_t tile = 0; tile < list.tiles(); ++tile) {
      const int64_t first = list.start(tile), last = list.start(tile + 1);
      call.taps = list.from + first;
      call.out = list.to + first;
      blend.taps = scratch_.latents + first;
      if (args_.upcoming) args_.upcoming->give(call, sizeof(T));
      fetch_ahead(call, tile, list.tiles(), args_.channels * kPanel * int64_t{sizeof(float)});
      gemm_tile(kFloat32, static_cast<int>(last - first), call.columns)(call);
    }
  }

  // The expansion's weights for this image: of every panel a row of bias, then one for each channel.
  float* folded(int64_t panel) const { return scratch_.folded + panel * (args_.channels + 1) * kPanel; }
  void fold_panel(int64_t panel, int64_t place) const {
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
  void fold_panels() const {
    for (int64_t panel = 0; args_.fusion.folded && panel < layout_.panels && layout_.panels > 1; ++panel) fold_panel(panel, panel);
  }

  // `place`: where the panel lies in the ring.
  void expand_panel(int64_t panel, int64_t place) const {
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

  void depthwise_panel(int64_t panel, int64_t place, const Span& span) const {
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
  void add_span(const Span& span, const DepthwiseRun& run, float* sums) const {
    const int64_t row = image_ * args_.out_height + span.y;
    const uint8_t* counted = args_.counted ? args_.counted + row * args_.out_width : nullptr;
    for (int32_t x = next_open(counted, span.first, span.last); x < span.last;) {
      const int32_t end = next_closed(counted, x, span.last);
      add_pixels(run.out + (x - span.first) * run.out_pixel, end - x, run.out_pixel, run.channels, sums);
      x = next_open(counted, end, span.last);
    }
  }

  void depthwise_span(const Span& span) const {
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

  void project_panel(int64_t panel, int64_t from, int64_t to) const {
    if (from >= to) return;
    TileCall call = panel_call(args_.project_weight, args_.project_bias, args_.hidden, panel, args_.out_channels);
    call.column = panel * kPanel;
    call.activation = args_.activation[2];
    call.final_activation = args_.final_activation;
    multiply(scratch_.project, from, to, kDtypeOf<T>, layout_.hidden_stride, call, args_.residual != nullptr,
             Fetch::kResults, args_.upcoming);
  }

 private:
  T* out_row(int64_t y) const { return args_.out + (image_ * args_.out_height + y) * args_.out_width * args_.out_stride; }

  const InvertedArgsOf<T>& args_;
  const Layout<T>& layout_;
  Scratch<T> scratch_;
  const int64_t image_;
  int64_t first_panel_ = 0;  // of the buffer behind the depthwise convolution
  int64_t ready_ = 0;  // hidden rows of this image before this one are in the ring or were given up
};

// Zeros on both sides of every ring row; the border behind a row is the one before the next.
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

// Cutting by hidden channels spares the rows that two threads would both expand, for one more meeting of the threads.
// With several images for each thread few such rows are left.
template <typename T>
bool by_panels(const InvertedArgsOf<T>& args) {
  if (!args.expand_weight || args.threads < 2 || args.images >= 2 * args.threads) return false;
  const int64_t panels = panels_of(args.hidden);
  const bool even = panels % args.threads == 0 || panels >= 8 * args.threads || args.height <= kFewRows;
  return args.height <= kMostRowsByPanels && panels >= 2 * args.threads && even;
}

// What the chunks of rows leave for those who join their means: sums of a chunk's first and of its last image, and its rows.
template <typename T>
float* shared_sums(const InvertedArgsOf<T>& args, int64_t chunk, bool last) {
  return reinterpret_cast<float*>(args.shared) + (2 * chunk + last) * panels_of(args.hidden) * kPanel;
}

using RowRange = std::pair<int64_t, int64_t>;
template <typename T>
RowRange& shared_rows(const InvertedArgsOf<T>& args, int64_t chunk) {
  return reinterpret_cast<RowRange*>(shared_sums(args, inverted_chunks(args, 0), false))[chunk];
}

template <typename T>
float* means_of(const InvertedArgsOf<T>& args, int64_t image) {
  return args.means ? args.means + image * args.means_stride : nullptr;
}

template <typename T>
float mean_factor(const InvertedArgsOf<T>& args, int64_t image) {
  const int64_t area = int64_t{args.out_height} * args.out_width;
  const uint8_t* const open = args.need ? args.need : args.counted;
  const int64_t count = open ? ones(open + image * area, area) : area;
  return count ? 1.0f / static_cast<float>(count) : 0.0f;
}

template <typename T>
void run_rows(const InvertedArgsOf<T>& args, int64_t first, int64_t last, int64_t chunk, void* base) {
  const Layout<T> layout(args, false);
  const Scratch<T> scratch(args, layout, base, nullptr);
  if (args.expand_weight) clear_borders(layout, scratch.ring, args.width, layout.panels);
  for (int64_t image = first / args.out_height; image * args.out_height < last; ++image) {
    const int64_t start = image * args.out_height;
    const int64_t from = std::max(first - start, int64_t{0}), to = std::min<int64_t>(last - start, args.out_height);
    Walk<T> walk(args, layout, scratch, image);
    walk.fold_panels();
    walk.clear_means(0, layout.panels);
    for (int64_t y = from; y < to; y += layout.band) walk.band(y, std::min(y + layout.band, to));
    const bool whole = to - from == args.out_height;
    walk.take_means(0, layout.panels, whole ? mean_factor(args, image) : 1.0f,
                    whole ? means_of(args, image) : shared_sums(args, chunk, start + from != first));
  }
}

template <typename T>
void run_panels(const InvertedArgsOf<T>& args, int phase, int64_t chunk, void* base) {
  const int64_t image = chunk / args.threads, share = chunk % args.threads, panels = panels_of(args.hidden);
  const int64_t first = panels * share / args.threads, last = panels * (share + 1) / args.threads;
  const Layout<T> layout(args, true, args.slices ? std::min<int64_t>(last * kPanel, args.hidden) - first * kPanel : 0);
  const int64_t pixels = int64_t{args.out_height} * args.out_width;
  if (!args.project_weight) {
    const Scratch<T> scratch(args, layout, base, nullptr);
    Walk<T> walk(args, layout, scratch, image);
    clear_borders(layout, scratch.ring, args.width, 1);
    walk.clear_means(first, last);
    walk.hidden_panels(first, last);
    return walk.take_means(first, last, mean_factor(args, image), means_of(args, image));
  }
  if constexpr (kOwnSums<T>) {
    const int64_t step = panels_of(args.out_channels) * kPanel, part = pixels * step;
    float* const sums = args.shared + image * args.threads * part;
    const Scratch<T> scratch(args, layout, base, nullptr);
    Walk<T> walk(args, layout, scratch, image);
    if (phase == 1) return walk.join_share(share, args.threads, sums, step, part);
    clear_borders(layout, scratch.ring, args.width, 1);
    walk.hidden_panels(first, last);
    walk.project_sums(first, last, sums + share * part, step);
  } else {
    const Scratch<T> scratch(args, layout, base, args.shared + image * pixels * layout.hidden_stride);
    Walk<T> walk(args, layout, scratch, image);
    if (phase == 1) return walk.project_share(share, args.threads);
    clear_borders(layout, scratch.ring, args.width, 1);
    walk.hidden_panels(first, last);
  }
}

// Multiplications that an output row takes, its share of the hidden rows included, in units of the hidden width.
template <typename T>
int64_t row_cost(const InvertedArgsOf<T>& args, int64_t row) {
  const int64_t image = row / args.out_height, y = row % args.out_height;
  const int64_t open = args.need ? ones(args.need + row * args.out_width, args.out_width) : args.out_width;
  int64_t cost = open * (args.kernel[0] * args.kernel[1] + args.out_channels);
  if (args.fills) cost += (args.out_width - open) * args.out_channels / 2;
  if (!args.expand_weight) return cost;
  const int64_t first = y * args.stride[0], last = std::min<int64_t>(first + args.stride[0], args.height);
  const int64_t pixels = std::max<int64_t>(0, last - first) * args.width;
  const uint8_t* need = args.need_hidden;
  return cost + args.channels * (need ? ones(need + (image * args.height + first) * args.width, pixels) : pixels);
}

// The output rows of a chunk: equal work for all, wherever the mask is open. Every row belongs to one.
template <typename T>
RowRange rows_of(const InvertedArgsOf<T>& args, int64_t chunk, int64_t chunks) {
  const int64_t rows = args.images * args.out_height;
  if (!args.need) return {rows * chunk / chunks, rows * (chunk + 1) / chunks};
  int64_t total = 0, before = 0, first = rows, last = rows;
  for (int64_t row = 0; row < rows; ++row) total += row_cost(args, row);
  for (int64_t row = 0; row < rows; ++row) {
    // A row belongs to the chunk in which its middle falls.
    const int64_t cost = row_cost(args, row), middle = before + cost / 2;
    if (first == rows && middle * chunks >= total * chunk) first = row;
    if (chunk + 1 < chunks && middle * chunks >= total * (chunk + 1)) {
      last = row;
      break;
    }
    before += cost;
  }
  return {first, last};
}

// The mean of an image whose rows several chunks share; chunks are in order, so the sum is the same in every run.
template <typename T>
void join_means(const InvertedArgsOf<T>& args, int64_t image) {
  const int64_t chunks = inverted_chunks(args, 0), start = image * args.out_height, end = start + args.out_height;
  float* const mean = means_of(args, image);
  bool begun = false;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const auto [first, last] = shared_rows(args, chunk);
    if (last <= start || first >= end) continue;
    if (first <= start && last >= end) return;
    const float* const sums = shared_sums(args, chunk, first < start);
    for (int64_t c = 0; c < args.hidden; ++c) mean[c] = (begun ? mean[c] : 0.0f) + sums[c];
    begun = true;
  }
  const float factor = mean_factor(args, image);
  for (int64_t c = 0; c < args.hidden; ++c) mean[c] *= factor;
}

}  // namespace

template <typename T>
bool inverted_by_channels(const InvertedArgsOf<T>& args) {
  return by_panels(args);
}

template <typename T>
int inverted_phases(const InvertedArgsOf<T>& args) {
  if (!args.project_weight) return !args.means || by_panels(args) || args.threads == 1 ? 1 : 2;
  return by_panels(args) ? 2 : 1;
}

template <typename T>
int64_t inverted_chunks(const InvertedArgsOf<T>& args, int phase) {
  if (by_panels(args)) return args.images * args.threads;
  if (phase == 1) return args.images;
  return std::min<int64_t>(args.threads, args.images * args.out_height);
}

template <typename T>
void inverted_run_chunk(const InvertedArgsOf<T>& args, int phase, int64_t chunk, void* scratch) {
  if (by_panels(args)) return run_panels(args, phase, chunk, scratch);
  if (phase == 1) return join_means(args, chunk);
  const auto [first, last] = rows_of(args, chunk, inverted_chunks(args, 0));
  if (inverted_phases(args) > 1) shared_rows(args, chunk) = {first, last};
  run_rows(args, first, last, chunk, scratch);
}

template <typename T>
int64_t inverted_scratch_bytes(const InvertedArgsOf<T>& args) {
  int64_t bytes[2] = {};
  for (const bool by_panel : {false, true})
    Scratch<T>(args, Layout<T>(args, by_panel), nullptr, nullptr, &bytes[by_panel]);
  return std::max(bytes[0], bytes[1]);
}

template <typename T>
int64_t inverted_shared_bytes(const InvertedArgsOf<T>& args) {
  if (!args.project_weight) {
    const int64_t sums = 2 * panels_of(args.hidden) * kPanel * int64_t{sizeof(float)};
    return args.means && !by_panels(args) ? inverted_chunks(args, 0) * (sums + int64_t{sizeof(RowRange)}) : 0;
  }
  if (!by_panels(args)) return 0;
  const int64_t pixels = args.images * args.out_height * args.out_width;
  if (kOwnSums<T>) return pixels * args.threads * panels_of(args.out_channels) * kPanel * 4;
  return pixels * Layout<T>(args, true).hidden_stride * int64_t{sizeof(T)};
}

#define DYNACONV_INVERTED(T)                                                              \
  template bool inverted_by_channels(const InvertedArgsOf<T>&);                           \
  template int inverted_phases(const InvertedArgsOf<T>&);                                 \
  template int64_t inverted_chunks(const InvertedArgsOf<T>&, int);                        \
  template void inverted_run_chunk(const InvertedArgsOf<T>&, int, int64_t, void*);        \
  template int64_t inverted_scratch_bytes(const InvertedArgsOf<T>&);                      \
  template int64_t inverted_shared_bytes(const InvertedArgsOf<T>&);
DYNACONV_INVERTED(float)
DYNACONV_INVERTED(Bfloat16)
