// Working memory of one thread: handed out in order, taken back all at once, kept from call to call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace onepass::ONEPASS_ISA {

class Scratch {
 public:
  // The calling thread's.
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }

  // What the calling thread lays out for those that share the i-th piece of its work, i < kShared.
  static constexpr int64_t kShared = 32;
  static Scratch& shared(int64_t i) {
    static thread_local Scratch scratch[kShared];
    return scratch[i];
  }

  // Take everything back. If the last task did not fit into the first block, make that one large enough for the next.
  void reset() {
    if (used_blocks_ > 1) {
      release();
      blocks_[0] = allocate(capacity_ = most_);
    }
    used_blocks_ = blocks_[0] != nullptr;
    used_ = total_ = most_ = 0;
  }

  // Take back all that was taken since a mark.
  struct Mark {
    int blocks;
    size_t used, total;
  };
  Mark mark() const { return {used_blocks_, used_, total_}; }
  void rewind(const Mark& mark) {
    used_ = used_blocks_ == mark.blocks ? mark.used : 0;  // nothing older lies in a newer block
    total_ = mark.total;
  }

  // n elements, on a cache line; uninitialised.
  template <class T>
  T* take(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64 + 64;
    if (used_blocks_ == 0 || used_ + bytes > capacity_) {
      if (used_blocks_ == kBlocks) throw std::bad_alloc();
      const size_t twice = used_blocks_ == 0 ? kBlockBytes : 2 * capacity_;  // few blocks, however much is taken
      const size_t capacity = bytes > twice ? bytes : twice;
      blocks_[used_blocks_] = allocate(capacity);  // or throws, and all is as before
      ++used_blocks_;
      capacity_ = capacity;
      used_ = 0;
    }
    total_ += bytes;
    most_ = total_ > most_ ? total_ : most_;
    char* p = blocks_[used_blocks_ - 1] + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(p);
  }

  template <class T>
  T* zeros(int64_t n) {
    T* p = take<T>(n);
    __builtin_memset(p, 0, static_cast<size_t>(n) * sizeof(T));
    return p;
  }

  ~Scratch() { release(); }

 private:
  static constexpr int kBlocks = 64;
  static constexpr size_t kBlockBytes = size_t{1} << 20;

  static char* allocate(size_t bytes) {
    void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (p == nullptr) throw std::bad_alloc();
    return static_cast<char*>(p);
  }

  void release() {
    for (char*& block : blocks_) {
      std::free(block);
      block = nullptr;
    }
    used_blocks_ = 0;
  }

  char* blocks_[kBlocks] = {};
  int used_blocks_ = 0;
  size_t capacity_ = 0, used_ = 0, total_ = 0, most_ = 0;  // most_: that total_ has been
};

// Run body(i) for i in [0, count) on the executor's threads, each with an empty scratch.
template <class F, class E>
void parallel(const E& executor, int64_t count, const F& body) {
  executor.run(
      executor, count,
      [](void* context, int64_t i) {
        Scratch::mine().reset();
        (*static_cast<const F*>(context))(i);
      },
      const_cast<F*>(&body));
}

}  // namespace onepass::ONEPASS_ISA
