// Which steps run some images at a time. Where the maps of a batch do not fit the caches, a stretch of steps takes image after
// image: what a step writes is still in the cache when the next one reads it, and the maps between them have memory for a
// window of images only.

#pragma once

#include <cstdint>
#include <vector>

struct Plan;

// Bytes beyond which a batch is cut, bytes of the maps that a step touches in one window, and steps with large maps (or channel
// fusions) that make a stage worth its while.
struct WindowLimits {
  int64_t batch = int64_t{3} << 20, window = int64_t{3} << 19;
  int steps = 3;
};

// Steps [first, last) take `images` at a time.
struct Stage {
  int32_t first, last;
  int64_t images;
  std::vector<bool> inside;  // of each value: nobody outside of the stage touches it, so it lives in a window's memory
};

// In order, without overlap; the steps between them take the whole batch.
std::vector<Stage> stages_of(const Plan& plan, int64_t images);

// Stages of networks with channel fusions, of which most steps are too small to share. Every thread takes windows of at most
// `images` alone, all steps of one after the other: it waits for nobody, and its maps stay in its own cache.
std::vector<Stage> own_stages_of(const Plan& plan, int64_t images);

// Whether they serve a batch: all threads have as many images, and no step would be cut in another way for few of them.
inline bool deals_evenly(int64_t images, int threads) { return images >= 2 * threads && images % threads == 0; }
