// Expansions and depthwise convolutions without a projection, in float32: they write the result themselves, and take its mean over
// the open positions where that is wanted.

#include <cstring>

#include "inverted_walk.h"
#include "mask_bytes.h"

namespace inverted {

namespace {

class UnprojectedWalk : HiddenWalk<float> {
 public:
  using HiddenWalk<float>::HiddenWalk;

  void band(int64_t first, int64_t last) {
    if (!find_spans(first, last)) return;
    scratch_.buffer = out_row(first);
    hidden_band(first, last);
  }

  // The hidden panels [first, last) of the whole image.
  void panels(int64_t first, int64_t last) {
    if (!find_spans(0, args_.out_height)) return;
    first_panel_ = args_.slices ? first : 0;
    scratch_.buffer = out_row(0) + first_panel_ * kPanel * int64_t{args_.out_height} * args_.out_width;
    hidden_panels(first, last);
  }

  void fold_panels() const {
    for (int64_t panel = 0; args_.fusion.folded && panel < layout_.panels && layout_.panels > 1; ++panel) fold_panel(panel, panel);
  }

  // The sums over the rows that were walked since the last call, of the hidden panels [first, last).
  void clear_means(int64_t first, int64_t last) const {
    if (args_.means) std::memset(scratch_.means + first * kPanel, 0, (last - first) * kPanel * sizeof(float));
  }
  void take_means(int64_t first, int64_t last, float factor, float* to) const {
    const int64_t end = std::min<int64_t>(last * kPanel, args_.hidden);
    for (int64_t c = first * kPanel; args_.means && c < end; ++c) to[c] = scratch_.means[c] * factor;
  }

 private:
  float* out_row(int64_t y) const { return args_.out + (image_ * args_.out_height + y) * args_.out_width * args_.out_stride; }
};

// What the chunks of rows leave for those who join their means: sums of a chunk's first and of its last image, and its rows.
float* shared_sums(const InvertedArgs& args, int64_t chunk, bool last) {
  return args.shared + (2 * chunk + last) * panels_of(args.hidden) * kPanel;
}
RowRange& shared_rows(const InvertedArgs& args, int64_t chunk) {
  return reinterpret_cast<RowRange*>(shared_sums(args, inverted_chunks(args, 0), false))[chunk];
}

float* means_of(const InvertedArgs& args, int64_t image) { return args.means ? args.means + image * args.means_stride : nullptr; }

float mean_factor(const InvertedArgs& args, int64_t image) {
  const int64_t area = int64_t{args.out_height} * args.out_width;
  const uint8_t* const open = args.need ? args.need : args.counted;
  const int64_t count = open ? ones(open + image * area, area) : area;
  return count ? 1.0f / static_cast<float>(count) : 0.0f;
}

}  // namespace

void unprojected_rows(const InvertedArgs& args, RowRange rows, int64_t chunk, void* base) {
  const Layout<float> layout(args, false);
  const Scratch<float> scratch(args, layout, base, nullptr);
  if (inverted_phases(args) > 1) shared_rows(args, chunk) = rows;
  clear_borders(layout, scratch.ring, args.width, layout.panels);
  each_image(args, rows, [&](int64_t image, int64_t from, int64_t to) {
    UnprojectedWalk walk(args, layout, scratch, image);
    walk.fold_panels();
    walk.clear_means(0, layout.panels);
    for (int64_t y = from; y < to; y += layout.band) walk.band(y, std::min(y + layout.band, to));
    const bool whole = to - from == args.out_height;
    walk.take_means(0, layout.panels, whole ? mean_factor(args, image) : 1.0f,
                    whole ? means_of(args, image) : shared_sums(args, chunk, image != rows.first / args.out_height));
  });
}

void unprojected_panels(const InvertedArgs& args, int64_t chunk, void* base) {
  const int64_t image = chunk / args.threads, share = chunk % args.threads, panels = panels_of(args.hidden);
  const int64_t first = panels * share / args.threads, last = panels * (share + 1) / args.threads;
  const Layout<float> layout(args, true, args.slices ? std::min<int64_t>(last * kPanel, args.hidden) - first * kPanel : 0);
  const Scratch<float> scratch(args, layout, base, nullptr);
  UnprojectedWalk walk(args, layout, scratch, image);
  clear_borders(layout, scratch.ring, args.width, 1);
  walk.clear_means(first, last);
  walk.panels(first, last);
  walk.take_means(first, last, mean_factor(args, image), means_of(args, image));
}

// Chunks are in order, so the sum is the same in every run.
void join_means(const InvertedArgs& args, int64_t image) {
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

int64_t shared_means_bytes(const InvertedArgs& args) {
  const int64_t sums = 2 * panels_of(args.hidden) * kPanel * int64_t{sizeof(float)};
  return args.means ? inverted_chunks(args, 0) * (sums + int64_t{sizeof(RowRange)}) : 0;
}

}  // namespace inverted
