// Fetching the rows of the next tile, a few lines at a time so that no burst of them holds up the products.

#pragma once

#include "gemm.h"
#include "vectors.h"

constexpr int64_t kBurstBytes = 64;  // of every row's channels that are multiplied between two bursts
constexpr int kBurstLines = 8;       // of results that are fetched at once

// Past the ends of rows this asks for memory that may not be there, which a prefetch may.
DYNACONV_INLINE const void* beyond(const void* from, int64_t bytes) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + bytes);
}

class NextRowsFetch {
 public:
  DYNACONV_INLINE_MEMBER NextRowsFetch(const TileCall& call, int64_t element)
      : next_(call.next), later_(call.next.later), element_(element), offset_(call.tap_offset * element) {}

  // Before the products with the bytes [at, at + kBurstBytes) of the channels of a tap.
  DYNACONV_INLINE_MEMBER void burst(int tap, int64_t at) {
    if (later_) {
      for (int64_t line = 0; line < kLaterBytes; line += 64) __builtin_prefetch(beyond(later_, line), 0, 2);
      later_ += kLaterBytes;
    }
    if (next_.taps)
      for (int r = 0; r < next_.rows; ++r) __builtin_prefetch(beyond(next_.taps[tap * kMaxRows + r], offset_ + at), 0, 3);
    if (next_.out && row_ < next_.rows) results();
  }

 private:
  DYNACONV_INLINE_MEMBER void results() {
    const int rows = kBurstLines * 64 / (kPanel * static_cast<int>(element_));
    const int end = row_ + rows < next_.rows ? row_ + rows : next_.rows;
    for (; row_ < end; ++row_) {
      for (int64_t line = 0; line < kPanel * element_; line += 64) {
        __builtin_prefetch(beyond(next_.out[row_], next_.column * element_ + line), 1, 3);
        if (next_.residual) __builtin_prefetch(beyond(next_.residual[row_], next_.column * element_ + line), 0, 3);
      }
    }
  }

  const NextRows& next_;
  const char* later_;
  const int64_t element_, offset_;
  int row_ = 0;
};
