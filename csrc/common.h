// What every kernel file needs: the split of work over threads, scratch, and the refusal of bad rows.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "vec.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Rows go in pieces of this many entries: 8 KiB of floats, which stay in the first-level cache, and the unit of every
// sum. Sums run within a piece, then over pieces in order, so that no result depends on the number of threads.
constexpr int64_t kPiece = 2048;
// What is worth the waking of a thread, where the pieces of one row go in parallel.
constexpr int64_t kPiecesPerTask = 8;

inline int64_t count_pieces(int64_t n) { return (n + kPiece - 1) / kPiece; }

// Calls body(piece, begin, end) for all pieces of a row; in parallel, unless rows already are.
template <typename Body>
inline void for_pieces(int64_t n, int64_t pieces_per_task, Body body) {
  at::parallel_for(0, count_pieces(n), pieces_per_task, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) body(piece, piece * kPiece, std::min(n, (piece + 1) * kPiece));
  });
}

// Calls body(row, slot), slot < scratch_slots(rows): rows in parallel where there are enough to keep all threads busy
// to the end, else one after the other, and then the pieces of a row may go in parallel.
inline bool rows_in_parallel(int64_t rows) {
  const int64_t threads = at::get_num_threads();
  return threads > 1 && (rows % threads == 0 || rows >= 4 * threads);
}

inline int64_t scratch_slots(int64_t rows) { return rows_in_parallel(rows) ? at::get_num_threads() : 1; }

template <typename Body>
inline void for_rows(int64_t rows, Body body) {
  if (!rows_in_parallel(rows)) {
    for (int64_t row = 0; row < rows; ++row) body(row, 0);
    return;
  }
  at::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) body(row, at::get_thread_num());
  });
}

// Lowest row that holds no distribution, if any; kernels note it and go on, since nothing may throw between threads.
class BadRow {
 public:
  void note(int64_t row) {
    int64_t seen = row_.load(std::memory_order_relaxed);
    while (row < seen && !row_.compare_exchange_weak(seen, row, std::memory_order_relaxed)) {
    }
  }
  void check(const char* op) const {
    TORCH_CHECK_VALUE(row_ == kNone, op,
                      ": expected every row to leave a token possible under each model of positive weight, and no NaN "
                      "or +inf in logits, reference, weights or carry, got a row without a distribution at index ",
                      row_.load(), "; mask or repair that row first");
  }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> row_{kNone};
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
