// DCD's convolution: a static weight whose outputs are scaled for each image, plus a low-rank part at the centre tap with a
// small dynamic matrix between two projections. Source: arXiv 2103.08756, equation 6.
//
// Folded, every image gets a kernel of its own, like a mixture. Factored, the static weight serves the whole batch, and the
// low-rank part is computed row by row; that is cheaper on small maps.

#include "fusion.h"

namespace {

constexpr int64_t kTableRows = kMostTiles * kMaxRows;
constexpr int64_t kOwnMacs = 256 << 10;  // of a kernel that every thread folds for itself, rather than meet the others for it

// Floats that all threads share, for one image.
int64_t shift_floats(const Fusion& fusion) { return rounded_floats(fusion.rank_panels * kPanel); }
int64_t left_floats(const Fusion& fusion) {
  return fusion.folded && !fusion.matrix_first ? fusion.channels * rounded_floats(fusion.rank) : 0;
}
int64_t prepared_floats(const Fusion& fusion) { return fusion.outputs + shift_floats(fusion) + left_floats(fusion); }
// Floats of a thread: the matrix as panels, and for the factored form projected rows, the scales and latent rows of few rows.
int64_t scratch_floats(const Fusion& fusion) {
  return matrix_floats(fusion.rank) + kMaxRows * (2 * fusion.rank_panels * kPanel + fusion.outputs);
}

// Every thread folds the kernels of the images that it has rows of.
class OwnKernels {
 public:
  OwnKernels(Worker& worker, const Step& step, const Fusion& fusion, const PanelShape& shape)
      : worker_(worker), run_(worker.run), step_(step), shape_(shape), rows_(rows_of(run_, step)), place_(run_, step, worker.zeros),
        keeps_(keeps(shape)), weights_(reinterpret_cast<float*>(worker.scratch)), bias_(weights_ + weight_floats(shape)),
        fold_(run_, step, fusion, bias_ + shape.panels * kPanel),
        table_(worker.scratch + rounded_floats(weight_floats(shape) + shape.panels * kPanel + ImageFold::floats(fusion)) * 4) {}

  static int64_t scratch_bytes(const Fusion& fusion, const PanelShape& shape) {
    return rounded_floats(weight_floats(shape) + shape.panels * kPanel + ImageFold::floats(fusion)) * 4 + table_bytes(1);
  }
  // Folding is little work, or every thread has whole images.
  static bool fits(const Run& run, const Step& step, const PanelShape& shape, int threads) {
    if (!shape.folds_alone()) return false;
    const Value& out = run.value(step.out);
    const bool whole = run.call.images >= 2 * threads || threads == 1;
    return keeps(shape) || (whole && int64_t{out.height} * out.width <= kTableRows);
  }

  void run() {
    if (rows_.all == 0) return;
    const int64_t images = run_.call.images, blocks = keeps_ ? row_blocks() : 1;
    worker_.share(images * blocks, [&](int64_t forward) {
      const int64_t task = worker_.backward(forward, images * blocks), image = task / blocks, block = task % blocks;
      Cut own{rows_.count(image), blocks, shape_.panels, 1};
      const int64_t first = own.first_row(block), count = own.first_row(block + 1) - first;
      if (count > 0) multiply(image, place_.table(table_, rows_.list, rows_.first(image) + first, count));
    });
  }

 private:
  static bool keeps(const PanelShape& shape) {
    return shape.panels * kPanel * shape.channels * (shape.rank + 1) <= kOwnMacs;
  }
  static int64_t weight_floats(const PanelShape& shape) {
    return (keeps(shape) ? shape.panels : 1) * shape.channels * kPanel;
  }
  int64_t row_blocks() const {
    const int64_t most = rows_.most(run_.call.images), row_bytes = run_.value(step_.in).stride * 4;
    const int threads = run_.call.images >= 4 * worker_.threads ? 1 : worker_.threads;
    const Cut all = cut(most, row_bytes, shape_.panels, shape_.channels * kPanel * 4,
                        double(shape_.channels) * std::min<int64_t>(kPanel, shape_.outputs), threads);
    return std::max(all.row_blocks, std::min<int64_t>(worker_.threads, ceil_of(most, kMaxRows)));
  }

  void multiply(int64_t image, const RowTable& table) {
    const bool known = keeps_ && image == ready_;
    if (!known) {
      fold_.take(image);
      for (int64_t panel = 0; panel < shape_.panels; ++panel) fold_.bias(panel, bias_ + panel * kPanel);
    }
    ready_ = image;
    for (int64_t panel = 0; panel < shape_.panels; ++panel) {
      float* const weight = weights_ + (keeps_ ? panel * shape_.channels * kPanel : 0);
      if (!known) fold_.weights(panel, 0, shape_.channels, weight);
      TileCall call{};
      call.taps_count = 1;
      call.channels = shape_.channels;
      call.weight = weight;
      call.bias = bias_ + panel * kPanel;
      call.column = panel * kPanel;
      call.columns = shape_.columns(panel);
      call.activation = step_.activation[0];
      call.final_activation = step_.final_activation;
      call.next.column = call.column;
      for (int64_t tile = 0; tile < table.tiles; ++tile) {
        table.point(call, tile);
        // The input is larger than the caches, and a tile reads little of many rows. Even ones are fast enough without.
        const bool more = tile + 1 < table.tiles && !call.row_step;
        call.next.rows = more ? table.rows_of(tile + 1) : 0;
        call.next.taps = more && panel == 0 ? table.taps + (tile + 1) * kMaxRows : nullptr;
        call.next.out = more ? table.outs + (tile + 1) * kMaxRows : nullptr;
        call.next.residual = more && table.adds && !table.in_place ? table.adds + (tile + 1) * kMaxRows : nullptr;
        worker_.upcoming.give(call, sizeof(float));
        gemm_tile(kFloat32, table.rows_of(tile), call.columns)(call);
      }
    }
  }

  Worker& worker_;
  const Run& run_;
  const Step& step_;
  const PanelShape& shape_;
  const Images rows_;
  const ConvRows place_;
  const bool keeps_;  // the kernel of an image for its other rows
  float *const weights_, *const bias_;
  ImageFold fold_;
  char* const table_;
  int64_t ready_ = -1;  // whose kernel is kept
};

void run_folded(Worker& worker, const Step& step, const Fusion& fusion) {
  const Run& run = worker.run;
  const int64_t images = run.call.images, rank = fusion.rank, rank_row = rounded_floats(rank);
  auto* const scale = reinterpret_cast<float*>(worker.shared);
  float *const shift = scale + images * fusion.outputs, *const left = shift + images * shift_floats(fusion);
  const auto* reduce = static_cast<const float*>(fusion.reduce.weight);
  const int64_t parts = left_floats(fusion) && images < worker.threads ? worker.threads : 1;
  worker.share(images * parts, [&](int64_t task) {
    const int64_t image = task / parts, part = task % parts;
    const Coefficients own(run, step, fusion, image);
    auto* panels = reinterpret_cast<float*>(worker.scratch);
    take_panels(own.matrix, fusion.rank, panels);
    if (part == 0) {
      take_scale(step, own.scale, fusion.conv.out_channels, fusion.outputs, scale + image * fusion.outputs);
      RowsTimesPanels{fusion.reduce.bias, 1, 0, rank, panels, rank, shift + image * shift_floats(fusion), 0}.multiply();
    }
    if (!left_floats(fusion)) return;
    const int64_t first = fusion.channels * part / parts, last = fusion.channels * (part + 1) / parts;
    float* const out = left + image * left_floats(fusion) + first * rank_row;
    RowsTimesPanels{reduce + first * rank, last - first, rank, rank, panels, rank, out, rank_row}.multiply();
  });
  worker.barrier();
  Prepared prepared;
  prepared.scale = scale;
  prepared.scale_step = fusion.outputs;
  prepared.shift = shift;
  prepared.shift_step = shift_floats(fusion);
  prepared.right = static_cast<const float*>(fusion.expand.weight);
  prepared.offset = fusion.expand.bias;
  if (fusion.matrix_first) {
    prepared.left = reduce;
    prepared.left_row = fusion.rank;
    prepared.matrix = Coefficients(run, step, fusion, 0).matrix;
    prepared.matrix_step = run.value(step.aux[0]).stride;
  } else {
    prepared.left = left;
    prepared.left_step = left_floats(fusion);
    prepared.left_row = rank_row;
  }
  const PanelShape shape(run.plan, step);
  DynamicTask(worker, step, shape, prepared, worker.shared + ceil_of(images * prepared_floats(fusion) * 4, 64) * 64).run();
}

class Factored {
 public:
  Factored(Worker& worker, const Step& step, const Fusion& fusion)
      : worker_(worker), run_(worker.run), step_(step), fusion_(fusion), shape_(run_.plan, step), rows_(rows_of(run_, step)),
        place_(run_, step, worker.zeros), latent_row_(fusion.rank_panels * kPanel),
        panels_(reinterpret_cast<float*>(worker.scratch)), reduced_(panels_ + matrix_floats(fusion.rank)),
        own_(run_.rows(step.out) <= kMaxRows),
        scale_(own_ ? reduced_ + kMaxRows * latent_row_ : reinterpret_cast<float*>(worker.shared)),
        latent_(scale_ + run_.call.images * fusion.outputs),
        scales_(reinterpret_cast<const float**>(worker.scratch + rounded_floats(scratch_floats(fusion)) * 4)),
        latents_(reinterpret_cast<const void**>(scales_ + kTableRows)), table_(reinterpret_cast<char*>(latents_ + kTableRows)) {}

  void run() const {
    if (rows_.all == 0) return;
    if (own_) {
      for (int64_t image = 0; image < run_.call.images; ++image) reduce(image, 0, 1);
    } else {
      reduce();
      worker_.barrier();
    }
    expand();
  }

 private:
  // Latent rows: the matrix times what Q makes of the positions under the centre tap.
  void reduce() const {
    const int64_t most = rows_.most(run_.call.images), threads = worker_.threads;
    const int64_t blocks = std::max<int64_t>(ceil_of(most, kMostTiles * kMaxRows),
                                             std::min(ceil_of(most, kMaxRows), ceil_of(2 * threads, run_.call.images)));
    worker_.share(run_.call.images * blocks, [&](int64_t task) { reduce(task / blocks, task % blocks, blocks); });
  }

  void reduce(int64_t image, int64_t block, int64_t blocks) const {
    const int64_t centre = (fusion_.conv.kernel[0] / 2) * fusion_.conv.kernel[1] + fusion_.conv.kernel[1] / 2;
    const int64_t own = rows_.count(image), from = own * block / blocks, count = own * (block + 1) / blocks - from;
    const int64_t first = rows_.first(image) + from;
    const Coefficients given(run_, step_, fusion_, image);
    if (block == 0)
      take_scale(step_, given.scale, fusion_.conv.out_channels, fusion_.outputs, scale_ + image * fusion_.outputs);
    if (count <= 0) return;
    take_panels(given.matrix, fusion_.rank, panels_);
    const RowTable table = place_.table(table_, rows_.list, first, count);
    for (int64_t tile = 0; tile < table.tiles; ++tile) {
      project(table.taps + (tile * table.taps_count + centre) * kMaxRows, table.rows_of(tile), table.step);
      float* const out = latent_ + (first + table.first_of(tile)) * latent_row_;
      RowsTimesPanels{reduced_, table.rows_of(tile), latent_row_, fusion_.rank, panels_, fusion_.rank, out, latent_row_}.multiply();
    }
  }

  void project(const void* const* taps, int rows, int64_t step) const {
    void* outs[kMaxRows];
    for (int r = 0; r < rows; ++r) outs[r] = reduced_ + r * latent_row_;
    TileCall call{};
    call.taps = taps;
    call.taps_count = 1;
    call.channels = fusion_.channels;
    call.row_step = step ? even_step(taps, rows, step) : 0;
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
        scales_[tile * kMaxRows + r] = scale_ + image * fusion_.outputs;
        latents_[tile * kMaxRows + r] = latent_ + first * latent_row_;
      }
  }

  void expand_tile(const RowTable& table, int64_t tile, int64_t panel, bool heavy) const {
    const int64_t column = shape_.first_output(panel), depth = shape_.taps * shape_.channels;
    const float* const right = static_cast<const float*>(fusion_.expand.weight) + panel * fusion_.rank * kPanel;
    const float** const scales = scales_ + tile * kMaxRows;
    const bool same_image = scales[0] == scales[table.rows_of(tile) - 1];
    const Blend blend{scales, column, latents_ + tile * kMaxRows, same_image ? latent_row_ : 0, fusion_.rank, right,
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
    // Static weights stream through a single tile; P's would be waited for in every panel.
    if (heavy && table.tiles == 1)
      for (int64_t i = 0; i < fusion_.rank * kPanel; i += 16) __builtin_prefetch(right + i, 0, 2);
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
  const int64_t latent_row_;
  float *const panels_, *const reduced_;
  const bool own_;  // rows are so few that every thread finds the latent ones of all for itself
  float *const scale_, *const latent_;
  const float** const scales_;
  const void** const latents_;
  char* const table_;
};

}  // namespace

int64_t scratch_fusion(const Plan& plan, const Step& step) {
  const Fusion fusion(plan, step);
  const PanelShape shape(plan, step);
  const int64_t own = rounded_floats(scratch_floats(fusion)) * 4 + 2 * kTableRows * int64_t{sizeof(void*)} + table_bytes(shape.taps);
  const int64_t most = std::max(own, scratch_by_channels(plan, step));
  if (!fusion.folded) return most;
  return std::max({most, scratch_dynamic(plan, step), shape.folds_alone() ? OwnKernels::scratch_bytes(fusion, shape) : 0});
}

int64_t shared_fusion(const Plan& plan, const Step& step, int64_t images, int threads) {
  const Fusion fusion(plan, step);
  const int64_t rows = int64_t{plan.values[step.out].height} * plan.values[step.out].width;
  int64_t own = images * prepared_floats(fusion) * 4 + kSlack;
  own += fusion.folded ? shared_dynamic(plan, step, images) : images * rows * fusion.rank_panels * kPanel * 4;
  return std::max(own, shared_by_channels(plan, step, images, threads));
}

void step_channel_fusion(Worker& worker, const Step& step) {
  const Run& run = worker.run;
  const Fusion fusion(run.plan, step);
  const PanelShape shape(run.plan, step);
  if (!rows_of(run, step).list && cut_by_channels(run.plan, step, run.call.images, worker.threads))
    fusion_by_channels(worker, step, fusion);
  else if (!fusion.folded) Factored(worker, step, fusion).run();
  else if (OwnKernels::fits(run, step, shape, worker.threads)) OwnKernels(worker, step, fusion, shape).run();
  else run_folded(worker, step, fusion);
}
