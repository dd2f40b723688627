// The second phase of a gate's logits: what the whole image adds to every position of it.

#pragma once

#include <algorithm>
#include <cstdint>

#include "run.h"

constexpr int64_t kGateTasks = 8;  // a thread

// Calls body(line, start) for every line of the logits. `start` is the bias and, where there is a linear layer, its product with the
// image's mean: `line_sums` has the products with the lines of the map, added up in order; without such a layer it is null.
// Of one image the first thread adds it alone, and can go on to decide (see ends_alone).
template <class Body>
void each_gate_line(Worker& worker, const Conv& conv, const Value& in, const float* line_sums, int32_t height,
                    const Body& body) {
  const bool alone = worker.run.call.images == 1;
  const int64_t lines = worker.run.call.images * height, tasks = alone ? 1 : std::min(lines, kGateTasks * worker.threads);
  const auto add = [&](int64_t task) {
    int64_t image = -1;
    float start = 0;
    for (int64_t line = lines * task / tasks; line < lines * (task + 1) / tasks; ++line) {
      if (line / height != image) {
        image = line / height;
        double sum = 0;
        for (int32_t y = 0; line_sums && y < in.height; ++y) sum += line_sums[image * in.height + y];
        start = conv.bias[0] + static_cast<float>(sum / (double(in.height) * in.width));
      }
      body(line, start);
    }
  };
  if (!alone) worker.share(tasks, add);
  else if (worker.id == 0) add(0);
}
