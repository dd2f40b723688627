// Masks as bytes of 0 and 1.

#pragma once

#include <cstdint>
#include <cstring>

// How many of `count` bytes of 0 and 1 are 1.
inline int64_t ones(const uint8_t* bytes, int64_t count) {
  int64_t sum = 0, i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, bytes + i, 8);
    sum += eight * 0x0101010101010101u >> 56;
  }
  for (; i < count; ++i) sum += bytes[i];
  return sum;
}
