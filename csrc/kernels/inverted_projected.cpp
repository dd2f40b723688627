// Fused inverted residuals with a projection: what lies behind the depthwise convolution waits in a buffer of the thread.

#include <cstring>

#include "inverted_walk.h"
#include "pixel_sums.h"
#include "rowwise.h"

namespace inverted {

namespace {

template <typename T>
class ProjectedWalk : HiddenWalk<T> {
 public:
  using HiddenWalk<T>::HiddenWalk;

  void band(int64_t first, int64_t last) {
    open_band(first, last);
    // What they get was read a moment ago.
    fill_closed(first, last);
  }

  // The hidden panels [first, last) of the whole image, as far as the buffer.
  void part_of_hidden(int64_t first, int64_t last) {
    first_panel_ = kOwnSums<T> ? first : 0;
    if (list_open(0, args_.out_height)) this->hidden_panels(first, last);
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

  // Adds the sums of all threads up for the part `share` of the open pixels.
  void join_share(int64_t share, int64_t shares, const float* sums, int64_t step, int64_t part) {
    fill_share(share, shares);
    list_open(0, args_.out_height);
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
    list_open(0, args_.out_height);
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

 private:
  using HiddenWalk<T>::args_;
  using HiddenWalk<T>::layout_;
  using HiddenWalk<T>::scratch_;
  using HiddenWalk<T>::image_;
  using HiddenWalk<T>::spans_;
  using HiddenWalk<T>::first_panel_;

  void open_band(int64_t first, int64_t last) {
    if (!list_open(first, last)) return;
    this->hidden_band(first, last);
    for (int64_t panel = 0; panel < panels_of(args_.out_channels); ++panel) project_panel(panel, 0, scratch_.project.tiles());
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
  // Closed pixels of the part `share` of an image's rows.
  void fill_share(int64_t share, int64_t shares) const {
    fill_closed(args_.out_height * share / shares, args_.out_height * (share + 1) / shares);
  }

  // The open pixels of the rows [first, last): spans for the depthwise convolution, pointers for the projection.
  bool list_open(int64_t first, int64_t last) {
    const bool any = this->find_spans(first, last);
    scratch_.project.count = 0;
    for (int64_t i = 0; i < spans_; ++i) list_span(scratch_.spans[i]);
    return any;
  }
  // Everything is a local, since a store of a pointer could change any member.
  void list_span(const Span& span) {
    const int64_t pixel = (image_ * args_.out_height + span.y) * args_.out_width + span.first, count = span.last - span.first;
    const int64_t step = layout_.hidden_stride, out_step = args_.out_stride, add_step = args_.residual_stride;
    const void** const sources = scratch_.project.from + span.index;
    void** const results = scratch_.project.to + span.index;
    const void** const adds = scratch_.project.add + span.index;
    const T* from = scratch_.buffer + span.index * step;
    T* to = args_.out + pixel * out_step;
    scratch_.project.count = span.index + count;
    for (int64_t i = 0; i < count; ++i, from += step, to += out_step) {
      sources[i] = from;
      results[i] = to;
    }
    if (!args_.residual) return;
    const T* add = args_.residual + pixel * add_step;
    for (int64_t i = 0; i < count; ++i, add += add_step) adds[i] = add;
  }
};

}  // namespace

template <typename T>
void projected_rows(const InvertedArgsOf<T>& args, RowRange rows, void* base) {
  const Layout<T> layout(args, false);
  const Scratch<T> scratch(args, layout, base, nullptr);
  if (args.expand_weight) clear_borders(layout, scratch.ring, args.width, layout.panels);
  each_image(args, rows, [&](int64_t image, int64_t from, int64_t to) {
    ProjectedWalk<T> walk(args, layout, scratch, image);
    for (int64_t y = from; y < to; y += layout.band) walk.band(y, std::min(y + layout.band, to));
  });
}

template <typename T>
void projected_panels(const InvertedArgsOf<T>& args, int phase, int64_t chunk, void* base) {
  const int64_t image = chunk / args.threads, share = chunk % args.threads, panels = panels_of(args.hidden);
  const Layout<T> layout(args, true);
  const int64_t pixels = int64_t{args.out_height} * args.out_width;
  const int64_t first = panels * share / args.threads, last = panels * (share + 1) / args.threads;
  T* const shared = kOwnSums<T> ? nullptr : args.shared + image * pixels * layout.hidden_stride;
  const Scratch<T> scratch(args, layout, base, shared);
  ProjectedWalk<T> walk(args, layout, scratch, image);
  if constexpr (kOwnSums<T>) {
    const int64_t step = panels_of(args.out_channels) * kPanel, part = pixels * step;
    float* const sums = args.shared + image * args.threads * part;
    if (phase == 1) return walk.join_share(share, args.threads, sums, step, part);
    clear_borders(layout, scratch.ring, args.width, 1);
    walk.part_of_hidden(first, last);
    walk.project_sums(first, last, sums + share * part, step);
  } else {
    if (phase == 1) return walk.project_share(share, args.threads);
    clear_borders(layout, scratch.ring, args.width, 1);
    walk.part_of_hidden(first, last);
  }
}

template <typename T>
int64_t shared_sums_bytes(const InvertedArgsOf<T>& args) {
  const int64_t pixels = args.images * args.out_height * args.out_width;
  if (kOwnSums<T>) return pixels * args.threads * panels_of(args.out_channels) * kPanel * 4;
  return pixels * Layout<T>(args, true).hidden_stride * int64_t{sizeof(T)};
}

#define DYNACONV_PROJECTED(T)                                                     \
  template void projected_rows(const InvertedArgsOf<T>&, RowRange, void*);        \
  template void projected_panels(const InvertedArgsOf<T>&, int, int64_t, void*); \
  template int64_t shared_sums_bytes(const InvertedArgsOf<T>&);
DYNACONV_PROJECTED(float)
DYNACONV_PROJECTED(Bfloat16)

}  // namespace inverted
