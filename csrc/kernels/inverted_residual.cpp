// How a fused inverted residual is cut into chunks: by bands of output rows, or by panels of hidden channels.

#include "inverted_residual.h"

#include "inverted_walk.h"
#include "mask_bytes.h"

using namespace inverted;

namespace {

constexpr int kFewRows = 8;            // so few that two threads would compute most hidden rows twice
constexpr int kMostRowsByPanels = 16;  // of an image that is cut by hidden channels

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

}  // namespace

// Cutting by hidden channels spares the rows that two threads would both expand, for one more meeting of the threads.
// With several images for each thread few such rows are left.
template <typename T>
bool inverted_by_channels(const InvertedArgsOf<T>& args) {
  if (!args.expand_weight || args.threads < 2 || args.images >= 2 * args.threads) return false;
  const int64_t panels = panels_of(args.hidden);
  const bool even = panels % args.threads == 0 || panels >= 8 * args.threads || args.height <= kFewRows;
  return args.height <= kMostRowsByPanels && panels >= 2 * args.threads && even;
}

template <typename T>
int inverted_phases(const InvertedArgsOf<T>& args) {
  if (!args.project_weight) return !args.means || inverted_by_channels(args) || args.threads == 1 ? 1 : 2;
  return inverted_by_channels(args) ? 2 : 1;
}

template <typename T>
int64_t inverted_chunks(const InvertedArgsOf<T>& args, int phase) {
  if (inverted_by_channels(args)) return args.images * args.threads;
  if (phase == 1) return args.images;
  return std::min<int64_t>(args.threads, args.images * args.out_height);
}

template <typename T>
void inverted_run_chunk(const InvertedArgsOf<T>& args, int phase, int64_t chunk, void* scratch) {
  const bool panels = inverted_by_channels(args);
  if constexpr (sizeof(T) == 4) {
    if (!args.project_weight) {
      if (panels) return unprojected_panels(args, chunk, scratch);
      if (phase == 1) return join_means(args, chunk);
      return unprojected_rows(args, rows_of(args, chunk, inverted_chunks(args, 0)), chunk, scratch);
    }
  }
  if (panels) return projected_panels(args, phase, chunk, scratch);
  projected_rows(args, rows_of(args, chunk, inverted_chunks(args, 0)), scratch);
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
  if constexpr (sizeof(T) == 4)
    if (!args.project_weight) return inverted_by_channels(args) ? 0 : shared_means_bytes(args);
  return inverted_by_channels(args) ? shared_sums_bytes(args) : 0;
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
