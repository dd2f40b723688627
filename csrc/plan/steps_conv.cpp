// Convolutions as indirect GEMMs: ordinary, grouped, masked, and the stem that reads the picture itself.

#include <algorithm>

#include "../kernels/gemm.h"
#include "conv_rows.h"
#include "run.h"

namespace {

constexpr int64_t kCacheBytes = 384 << 10;  // of a block's activations, or of its weights: both fit the L2 cache
// A Winograd tile costs 16 products and its transforms, an output position 9 products.
constexpr double kTilePositions = 2.3;
constexpr int64_t kNearBytes = 4 << 20;    // maps that are larger come from further away than fetching them ahead costs
constexpr double kTaskMacs = 4e5;          // of the smallest task that is worth sharing

// In bfloat16 products cost half, and what grows with the channels rather than with their products weighs more.
double positions_of_a_tile(const Conv& conv, int dtype) {
  return dtype == kBfloat16 ? 2 + 26.0 / conv.in_channels + 26.0 / conv.out_channels : kTilePositions;
}

}  // namespace

Cut cut(int64_t rows, int64_t row_bytes, int64_t panels, int64_t panel_bytes, double panel_macs, int threads) {
  Cut c{rows, 1, panels, 1};
  const double macs = panel_macs * rows * panels;
  const int64_t useful = std::max<int64_t>(1, std::min<int64_t>(64, static_cast<int64_t>(macs / kTaskMacs)));
  const int64_t wanted = threads == 1 ? 1 : std::min<int64_t>(useful, 8 * threads) / threads * threads;
  const int64_t cached = std::max((rows * row_bytes + kCacheBytes - 1) / kCacheBytes,
                                  (rows + kMaxRows * kMostTiles - 1) / (kMaxRows * kMostTiles));
  const bool heavy = panels * panel_bytes > kCacheBytes;
  if (heavy) c.panel_groups = std::min(panels, (panels * panel_bytes + kCacheBytes - 1) / kCacheBytes);
  if (heavy || rows < kMaxRows * threads)
    c.panel_groups = std::max(c.panel_groups, std::min(panels, std::max<int64_t>(1, wanted)));
  const int64_t missing = (std::max<int64_t>(wanted, 1) + c.panel_groups - 1) / c.panel_groups;
  const int64_t most = std::max<int64_t>(1, rows / (heavy ? kMaxRows : kMaxRows / 2));
  c.row_blocks = std::max(cached, std::min(missing, most));
  // Few groups of panels leave a thread idle at the end unless they can be dealt out evenly.
  if (heavy && c.panel_groups < 4 * threads && c.panel_groups % threads && rows >= 2 * kMaxRows)
    c.row_blocks = std::max<int64_t>(c.row_blocks, threads);
  if (threads > 1 && c.panel_groups == 1 && c.row_blocks > 1 && c.row_blocks < rows)
    c.row_blocks = std::min(rows, (c.row_blocks + threads - 1) / threads * threads);
  return c;
}

namespace {

// The panels [from, to) of one tile whose taps are known.
struct PanelLoop {
  const Conv& conv;
  int64_t per_group, panel_bytes;
  int dtype;

  int64_t column(int64_t panel) const {
    return panel / per_group * (conv.out_channels / conv.groups) + panel % per_group * kPanel;
  }
  void run(TileCall& call, int rows, int64_t panel) const {
    const int64_t group = panel / per_group, within = panel % per_group;
    const int64_t outputs = conv.out_channels / conv.groups;
    call.tap_offset = group * (conv.in_channels / conv.groups);
    call.weight = static_cast<const char*>(conv.weight) + panel * panel_bytes;
    call.bias = conv.bias + panel * kPanel;
    call.column = column(panel);
    call.columns = static_cast<int>(std::min<int64_t>(kPanel, outputs - within * kPanel));
    gemm_tile(dtype, rows, call.columns)(call);
  }
};

// What the tile after this one touches: the next rows of a panel, or the first ones of the next panel. Field by field, since
// what is copied as a whole right after it was written waits for every store before it, and those may miss the caches.
void look_ahead(TileCall& call, const RowTable& table, int64_t tile, const PanelLoop& loop, int64_t panel, bool first, bool last) {
  const bool wraps = tile + 1 == table.tiles;
  const int64_t next = wraps ? 0 : tile + 1;
  const bool some = !(wraps && last);
  // Every panel but the first finds the inputs in the cache.
  call.next.taps = first && !wraps ? table.taps + next * kMaxRows * table.taps_count : nullptr;
  call.next.out = some ? table.outs + next * kMaxRows : nullptr;
  call.next.residual = table.adds && !table.in_place ? table.adds + next * kMaxRows : nullptr;
  call.next.column = loop.column(panel + (wraps && some));
  call.next.rows = table.rows_of(next);
}

int64_t panels_of(const Conv& conv) {
  return conv.groups * ((conv.out_channels / conv.groups + kPanel - 1) / kPanel);
}

}  // namespace

int64_t scratch_conv(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  return table_bytes(int64_t{conv.kernel[0]} * conv.kernel[1]);
}

void step_conv(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const Position* list = nullptr;
  int64_t count = run.rows(step.out);
  const GridState* mask = step.grid >= 0 ? &run.context.grids[step.grid] : nullptr;
  if (mask) {
    const GridState& grid = *mask;
    const int64_t listed = step.closed ? count - grid.open_count : grid.open_count;
    if (listed < count && (step.closed || double(listed) <= double(step.run_all_above) * count)) {
      list = step.closed ? grid.closed : grid.open;
      count = listed;
    }
  }
  if (count == 0) return;
  if (conv.winograd) {
    const int64_t all = run.call.images * ((out.height + 1) / 2) * ((out.width + 1) / 2);
    const int64_t tiles = list ? mask->tile_count : all;
    if (!conv.weight || double(tiles) * positions_of_a_tile(conv, in.dtype) < double(count))
      return step_winograd(worker, step, list ? mask->tiles : nullptr, tiles);
  }
  const int64_t element = element_bytes(in.dtype), taps = int64_t{conv.kernel[0]} * conv.kernel[1];
  const int64_t depth = taps * conv.in_channels / conv.groups;
  const int64_t panel_bytes = panel_elements(in.dtype, taps, conv.in_channels / conv.groups) * element;
  const int64_t per_group = (conv.out_channels / conv.groups + kPanel - 1) / kPanel;
  const int64_t in_bytes = in.stride * element;
  // A strided kernel touches more input rows than it makes output rows.
  const int64_t touched = taps == 1 ? 1 : int64_t{conv.stride[0]} * conv.stride[1];
  const Cut c = cut(count, in_bytes * touched, panels_of(conv), panel_bytes,
                    double(depth) * std::min<int64_t>(kPanel, conv.out_channels / conv.groups), worker.threads);
  const bool heavy = panels_of(conv) * panel_bytes > kFetchBytes;
  const bool far = run.rows(step.in) * in_bytes + run.rows(step.out) * out.stride * element_bytes(out.dtype) > kNearBytes;
  const ConvRows all_rows(run, step, worker.zeros);
  const PanelLoop loop{conv, per_group, panel_bytes, in.dtype};

  worker.share(c.tasks(), [&](int64_t task) {
    const int64_t block = task % c.row_blocks, group = task / c.row_blocks;
    const int64_t first = c.first_row(block), last = c.first_row(block + 1), rows = last - first;
    if (rows <= 0) return;
    const RowTable table = all_rows.table(worker.scratch, list, first, rows);
    TileCall call{};
    call.taps_count = static_cast<int>(taps);
    call.channels = conv.in_channels / conv.groups;
    call.activation = step.activation[0];
    call.final_activation = step.final_activation;
    call.float_out = out.dtype == kFloat32;
    const int64_t first_panel = c.first_panel(group), end = c.first_panel(group + 1);
    for (int64_t panel = first_panel; panel < end; ++panel) {
      for (int64_t tile = 0; tile < table.tiles; ++tile) {
        table.point(call, tile);
        if (heavy) fetch_ahead(call, tile, table.tiles, panel_bytes);
        worker.upcoming.give(call, element);
        if (far) look_ahead(call, table, tile, loop, panel, panel == first_panel, panel + 1 == end);
        loop.run(call, table.rows_of(tile), panel);
      }
    }
  });
}
