// Sizes of a tensor, of which a kernel's has at most four: an op makes a dozen of these, and none asks for memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace onepass {

class Sizes {
 public:
  static constexpr size_t kMost = 4;

  Sizes() = default;
  Sizes(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) push_back(size);
  }

  void push_back(int64_t size) { numbers_[count_++] = size; }

  size_t size() const { return count_; }
  const int64_t* data() const { return numbers_; }
  const int64_t* begin() const { return numbers_; }
  const int64_t* end() const { return numbers_ + count_; }
  int64_t& operator[](size_t i) { return numbers_[i]; }
  int64_t operator[](size_t i) const { return numbers_[i]; }

 private:
  int64_t numbers_[kMost] = {};
  size_t count_ = 0;
};

}  // namespace onepass
