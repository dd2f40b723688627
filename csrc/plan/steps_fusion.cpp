// DCD's convolution: a static weight whose outputs are scaled for each image, plus a low-rank part at the centre tap with a
// small dynamic matrix between two projections. Source: arXiv 2103.08756, equation 6.
//
// Folded, every image gets a kernel of its own, like a mixture. Factored, the static weight serves the whole batch, and the
// low-rank part is computed row by row; that is cheaper on small maps.

#include <cstring>

#include "dynamic_task.h"

namespace {

constexpr float kNoBias[kPanel] = {};
constexpr int64_t kTableRows = kMostTiles * kMaxRows;

int64_t rounded(int64_t floats) { return ceil_of(floats, 16) * 16; }

struct Fusion {
  const Conv &conv, &reduce, &expand;   // the static weight, Q, P
  int64_t outputs, rank, rank_panels, channels;
  bool folded, matrix_first;            // matrix_first: the matrix joins P, panel by panel, and not Q

  Fusion(const Plan& plan, const Step& step)
      : conv(plan.convs[step.conv[0]]), reduce(plan.convs[step.conv[1]]), expand(plan.convs[step.conv[2]]),
        outputs((ceil_of(conv.out_channels, kPanel) + 1) * kPanel), rank(reduce.out_channels), rank_panels(ceil_of(rank, kPanel)),
        channels(conv.in_channels), folded(step.ints[3] == 0) {
    const PanelShape shape(plan, step);
    matrix_first = shape.small && shape.chunk == shape.channels && conv.out_channels < channels;
  }
  // Floats that all threads share, for one image.
  int64_t scale() const { return outputs; }
  int64_t shift() const { return rounded(rank_panels * kPanel); }
  int64_t left() const { return folded && !matrix_first ? channels * rounded(rank) : 0; }
  int64_t prepared() const { return scale() + shift() + left(); }
  // Floats of a thread: the matrix as panels, and for the factored form projected rows.
  int64_t panels() const { return rank_panels * rank * kPanel; }
  int64_t scratch() const { return panels() + kMaxRows * rank_panels * kPanel; }
};

struct Coefficients {
  const float* scale;   // [out_channels]
  const float* matrix;  // [rank][rank]: row m holds what latent channel m gives to every latent channel
};

Coefficients coefficients(const Run& run, const Step& step, const Fusion& fusion, int64_t image) {
  const float* from = reinterpret_cast<const float*>(run.data(step.aux[0])) + image * run.value(step.aux[0]).stride;
  return {from, from + fusion.conv.out_channels};
}

// relu6(z + 3) / 3, or the number itself.
void take_scale(const Step& step, const Fusion& fusion, const float* from, float* to) {
  for (int64_t o = 0; o < fusion.conv.out_channels; ++o)
    to[o] = step.ints[4] ? std::min(std::max(from[o] + 3.0f, 0.0f), 6.0f) / 3.0f : from[o];
  for (int64_t o = fusion.conv.out_channels; o < fusion.outputs; ++o) to[o] = 0.0f;
}

// [rank][rank] as panels of 32 columns, zero padded.
void take_panels(const Fusion& fusion, const float* matrix, float* to) {
  std::memset(to, 0, fusion.panels() * sizeof(float));
  for (int64_t panel = 0; panel < fusion.rank_panels; ++panel) {
    const int64_t first = panel * kPanel, columns = std::min<int64_t>(kPanel, fusion.rank - first);
    for (int64_t m = 0; m < fusion.rank; ++m, to += kPanel)
      std::memcpy(to, matrix + m * fusion.rank + first, columns * sizeof(float));
  }
}

// Rows of `rank` numbers times the matrix in panels: out + r * out_row.
void multiply_panels(const Fusion& fusion, const float* rows, int64_t count, int64_t row, const float* panels, float* out,
                     int64_t out_row) {
  const void* taps[kMaxRows];
  void* outs[kMaxRows];
  TileCall call{};
  call.taps = taps;
  call.taps_count = 1;
  call.channels = fusion.rank;
  call.bias = kNoBias;
  call.out = outs;
  for (int64_t first = 0; first < count; first += kMaxRows) {
    const int here = static_cast<int>(std::min<int64_t>(kMaxRows, count - first));
    for (int r = 0; r < here; ++r) {
      taps[r] = rows + (first + r) * row;
      outs[r] = out + (first + r) * out_row;
    }
    for (int64_t panel = 0; panel < fusion.rank_panels; ++panel) {
      call.weight = panels + panel * fusion.rank * kPanel;
      call.column = panel * kPanel;
      call.columns = static_cast<int>(std::min<int64_t>(kPanel, fusion.rank - panel * kPanel));
      gemm_tile(kFloat32, here, call.columns)(call);
    }
  }
}

void run_folded(Worker& worker, const Step& step, const Fusion& fusion) {
  const Run& run = worker.run;
  const int64_t images = run.call.images, rank_row = rounded(fusion.rank);
  auto* const scale = reinterpret_cast<float*>(worker.shared);
  float *const shift = scale + images * fusion.scale(), *const left = shift + images * fusion.shift();
  const auto* reduce = static_cast<const float*>(fusion.reduce.weight);
  const int64_t parts = fusion.left() && images < worker.threads ? worker.threads : 1;
  worker.share(images * parts, [&](int64_t task) {
    const int64_t image = task / parts, part = task % parts;
    const Coefficients own = coefficients(run, step, fusion, image);
    auto* panels = reinterpret_cast<float*>(worker.scratch);
    take_panels(fusion, own.matrix, panels);
    if (part == 0) {
      take_scale(step, fusion, own.scale, scale + image * fusion.scale());
      multiply_panels(fusion, fusion.reduce.bias, 1, 0, panels, shift + image * fusion.shift(), 0);
    }
    if (!fusion.left()) return;
    const int64_t first = fusion.channels * part / parts, last = fusion.channels * (part + 1) / parts;
    multiply_panels(fusion, reduce + first * fusion.rank, last - first, fusion.rank, panels,
                    left + image * fusion.left() + first * rank_row, rank_row);
  });
  worker.barrier();
  Prepared prepared;
  prepared.scale = scale;
  prepared.scale_step = fusion.scale();
  prepared.shift = shift;
  prepared.shift_step = fusion.shift();
  prepared.right = static_cast<const float*>(fusion.expand.weight);
  prepared.offset = fusion.expand.bias;
  if (fusion.matrix_first) {
    prepared.left = reduce;
    prepared.left_row = fusion.rank;
    prepared.matrix = coefficients(run, step, fusion, 0).matrix;
    prepared.matrix_step = run.value(step.aux[0]).stride;
  } else {
    prepared.left = left;
    prepared.left_step = fusion.left();
    prepared.left_row = rank_row;
  }
  const PanelShape shape(run.plan, step);
  DynamicTask(worker, step, shape, prepared, worker.shared + ceil_of(images * fusion.prepared() * 4, 64) * 64).run();
}

class Factored {
 public:
  Factored(Worker& worker, const Step& step, const Fusion& fusion)
      : worker_(worker), run_(worker.run), step_(step), fusion_(fusion), shape_(run_.plan, step), rows_(rows_of(run_, step)),
        place_(run_, step, worker.zeros), scale_(reinterpret_cast<float*>(worker.shared)),
        latent_(scale_ + run_.call.images * fusion.scale()), latent_row_(fusion.rank_panels * kPanel),
        panels_(reinterpret_cast<float*>(worker.scratch)), reduced_(panels_ + fusion.panels()),
        scales_(reinterpret_cast<const float**>(worker.scratch + rounded(fusion.scratch()) * 4)),
        latents_(reinterpret_cast<const void**>(scales_ + kTableRows)), table_(reinterpret_cast<char*>(latents_ + kTableRows)) {}

  void run() const {
    if (rows_.all == 0) return;
    reduce();
    worker_.barrier();
    expand();
  }

 private:
  // Latent rows: the matrix times what Q makes of the positions under the centre tap.
  void reduce() const {
    const int64_t most = rows_.most(run_.call.images), threads = worker_.threads;
    const int64_t blocks = std::max<int64_t>(ceil_of(most, kMostTiles * kMaxRows),
                                             std::min(ceil_of(most, kMaxRows), ceil_of(2 * threads, run_.call.images)));
    const int64_t centre = (fusion_.conv.kernel[0] / 2) * fusion_.conv.kernel[1] + fusion_.conv.kernel[1] / 2;
    worker_.share(run_.call.images * blocks, [&](int64_t task) {
      const int64_t image = task / blocks, block = task % blocks, own = rows_.count(image);
      const int64_t from = own * block / blocks, count = own * (block + 1) / blocks - from, first = rows_.first(image) + from;
      const Coefficients given = coefficients(run_, step_, fusion_, image);
      if (block == 0) take_scale(step_, fusion_, given.scale, scale_ + image * fusion_.scale());
      if (count <= 0) return;
      take_panels(fusion_, given.matrix, panels_);
      const RowTable table = place_.table(table_, rows_.list, first, count);
      for (int64_t tile = 0; tile < table.tiles; ++tile) {
        project(table.taps + (tile * table.taps_count + centre) * kMaxRows, table.rows_of(tile));
        multiply_panels(fusion_, reduced_, table.rows_of(tile), latent_row_, panels_,
                        latent_ + (first + table.first_of(tile)) * latent_row_, latent_row_);
      }
    });
  }

  void project(const void* const* taps, int rows) const {
    void* outs[kMaxRows];
    for (int r = 0; r < rows; ++r) outs[r] = reduced_ + r * latent_row_;
    TileCall call{};
    call.taps = taps;
    call.taps_count = 1;
    call.channels = fusion_.channels;
    call.out = outs;
    for (int64_t panel = 0; panel < fusion_.rank_panels; ++panel) {
      call.weight = static_cast<const float*>(fusion_.reduce.weight) + panel * fusion_.channels * kPanel;
      call.bias = fusion_.reduce.bias + panel * kPanel;
      call.column = panel * kPanel;
      call.columns = static_cast<int>(std::min<int64_t>(kPanel, fusion_.rank - panel * kPanel));
      gemm_tile(kFloat32, rows, call.columns)(call);
    }
  }

  void expand() const {
    const int64_t depth = shape_.taps * shape_.channels;
    const Cut c = cut(rows_.all, run_.value(step_.in).stride * 4, shape_.panels, depth * kPanel * 4,
                      double(depth + fusion_.rank) * std::min<int64_t>(kPanel, shape_.outputs), worker_.threads);
    const bool heavy = shape_.panels * depth * kPanel * 4 > kFetchBytes;
    worker_.share(c.tasks(), [&](int64_t task) {
      const int64_t block = task % c.row_blocks, group = task / c.row_blocks;
      const int64_t first = c.first_row(block), count = c.first_row(block + 1) - first;
      if (count <= 0) return;
      const RowTable table = place_.table(table_, rows_.list, first, count);
      point_at_latent(table, first);
      for (int64_t panel = c.first_panel(group); panel < c.first_panel(group + 1); ++panel)
        for (int64_t tile = 0; tile < table.tiles; ++tile) expand_tile(table, tile, panel, heavy);
    });
  }

  // The scale and the latent row of every row of a table, tile by tile.
  void point_at_latent(const RowTable& table, int64_t first) const {
    for (int64_t tile = 0; tile < table.tiles; ++tile)
      for (int r = 0; r < table.rows_of(tile); ++r, ++first) {
        const int64_t image = rows_.list ? rows_.list[first].image : first / rows_.area;
        scales_[tile * kMaxRows + r] = scale_ + image * fusion_.scale();
        latents_[tile * kMaxRows + r] = latent_ + first * latent_row_;
      }
  }

  void expand_tile(const RowTable& table, int64_t tile, int64_t panel, bool heavy) const {
    const int64_t column = shape_.first_output(panel), depth = shape_.taps * shape_.channels;
    const float* const right = static_cast<const float*>(fusion_.expand.weight) + panel * fusion_.rank * kPanel;
    const Blend blend{scales_ + tile * kMaxRows, column, latents_ + tile * kMaxRows, fusion_.rank, right,
                      fusion_.expand.bias + panel * kPanel};
    TileCall call{};
    table.point(call, tile);
    call.taps_count = static_cast<int>(shape_.taps);
    call.channels = shape_.channels;
    call.tap_offset = panel / shape_.per_group * shape_.channels;
    call.weight = static_cast<const float*>(fusion_.conv.weight) + panel * depth * kPanel;
    call.bias = fusion_.conv.bias + panel * kPanel;
    call.column = column;
    call.columns = shape_.columns(panel);
    call.activation = step_.activation[0];
    call.final_activation = step_.final_activation;
    call.blend = &blend;
    worker_.upcoming.give(call, sizeof(float));
    if (heavy) fetch_ahead(call, tile, table.tiles, depth * kPanel * 4);
    gemm_tile(kFloat32, table.rows_of(tile), call.columns)(call);
  }

  Worker& worker_;
  const Run& run_;
  const Step& step_;
  const Fusion& fusion_;
  const PanelShape shape_;
  const Images rows_;
  const ConvRows place_;
  float *const scale_, *const latent_;
  const int64_t latent_row_;
  float *const panels_, *const reduced_;
  const float** const scales_;
  const void** const latents_;
  char* const table_;
};

}  // namespace

int64_t scratch_fusion(const Plan& plan, const Step& step) {
  const Fusion fusion(plan, step);
  const PanelShape shape(plan, step);
  const int64_t own = rounded(fusion.scratch()) * 4 + 2 * kTableRows * int64_t{sizeof(void*)} + table_bytes(shape.taps);
  return fusion.folded ? std::max(own, scratch_dynamic(plan, step)) : own;
}

int64_t shared_fusion(const Plan& plan, const Step& step, int64_t images) {
  const Fusion fusion(plan, step);
  const int64_t own = images * fusion.prepared() * 4 + kSlack, rows = int64_t{plan.values[step.out].height} * plan.values[step.out].width;
  if (fusion.folded) return own + shared_dynamic(plan, step, images);
  return own + images * rows * fusion.rank_panels * kPanel * 4;
}

void step_channel_fusion(Worker& worker, const Step& step) {
  const Fusion fusion(worker.run.plan, step);
  if (fusion.folded) run_folded(worker, step, fusion);
  else Factored(worker, step, fusion).run();
}
