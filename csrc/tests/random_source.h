// Where random tests get their decisions from: a seeded generator, or the bytes that a coverage-guided fuzzer offers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

class Source {
 public:
  explicit Source(uint64_t seed) : generator_(seed) {}
  Source(const uint8_t* data, size_t size) : generator_(size), data_(data), left_(size), bytes_(true) {}

  // Below `count`; 0 once a fuzzer's bytes are used up, which ends loops soon.
  int32_t below(int64_t count) {
    if (!bytes_) return static_cast<int32_t>(generator_() % static_cast<uint64_t>(count));
    uint32_t value = 0;
    for (int64_t range = count; range > 1 && left_ > 0; range >>= 8, --left_) value = value << 8 | *data_++;
    return static_cast<int32_t>(value % static_cast<uint64_t>(count));
  }
  bool chance(int percent) { return below(100) < percent; }
  template <typename T>
  T pick(std::initializer_list<T> of) {
    return *(of.begin() + below(static_cast<int64_t>(of.size())));
  }
  // Numbers around zero; their values are not worth a fuzzer's bytes.
  std::vector<float> noise(int64_t count, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> data(count);
    for (float& v : data) v = normal(generator_);
    return data;
  }

 private:
  std::mt19937_64 generator_;
  const uint8_t* data_ = nullptr;
  size_t left_ = 0;
  bool bytes_ = false;
};
