// The channel gather on the host. Two things decide its speed:
// * large results are written past the caches (streaming stores); ordinary stores would first read the target;
// * increasing index lists (the usual case for a selection) are turned into bit masks once, and AVX-512 VBMI2
//   compresses 32 channels at a time by mask; other lists are picked from several rows at once (pick_block.h).
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define PPF_X86 1
#endif

#include "gather.h"
#include "pick_block.h"

namespace ppf {
namespace {

// Results above this size will not be found in a cache anyway, so they are streamed to memory.
constexpr int64_t kStreamBytes = 4 << 20;
// A thread is worth starting (tens of microseconds) from about this much work upward.
constexpr int64_t kBytesPerThread = 1 << 20;
// Average length of consecutive channels from which one memcpy per run beats picking.
constexpr int64_t kRunBytes = 64;

#ifdef PPF_X86
// `bytes` is a multiple of 64 and the target 64-byte aligned: whole lines leave the core at once, a quarter faster than
// in four pieces.
__attribute__((target("avx512f"))) void stream_lines(char* target, const char* source, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), _mm512_loadu_si512(source + at));
  }
}

void stream_pieces(char* target, const char* source, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 16) {
    const __m128i held = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at));
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), held);
  }
}
#endif

void copy_bytes(char* target, const char* source, int64_t bytes, bool stream) {
#ifdef PPF_X86
  if (stream && bytes >= 256) {
    static const bool lines = __builtin_cpu_supports("avx512f");
    const int64_t head = (64 - reinterpret_cast<uintptr_t>(target) % 64) % 64, body = (bytes - head) / 64 * 64;
    if (head != 0) std::memcpy(target, source, head);
    (lines ? stream_lines : stream_pieces)(target + head, source + head, body);
    const int64_t done = head + body;
    if (done != bytes) std::memcpy(target + done, source + done, bytes - done);
    return;
  }
#endif
  (void)stream;
  std::memcpy(target, source, bytes);
}

// A fresh result of many megabytes costs more in page faults than in copying: ask for 2 MiB pages before writing.
void expect_large(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  // Advice only: where the kernel refuses it, everything works as before.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

void finish_stream() {
#ifdef PPF_X86
  _mm_sfence();
#endif
}

// Consecutive channels: `length` elements from source column `start`.
struct Run {
  int32_t start, length;
};

// How one index list picks columns, decided once for all rows.
struct ColumnPlan {
  std::vector<int32_t> index;
  std::vector<Run> runs;        // not empty: copy run by run
  std::vector<uint32_t> masks;  // not empty: compress `lanes` channels per mask
  int lanes = 0;
};

std::vector<Run> find_runs(const std::vector<int32_t>& index) {
  std::vector<Run> runs;
  for (const int32_t channel : index) {
    if (!runs.empty() && channel == runs.back().start + runs.back().length) {
      ++runs.back().length;
    } else {
      runs.push_back({channel, 1});
    }
  }
  return runs;
}

bool has_compress() {
#ifdef PPF_X86
  static const bool has = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw");
  return has;
#else
  return false;
#endif
}

ColumnPlan plan_columns(const GatherJob& job, std::vector<int32_t> index) {
  ColumnPlan plan;
  plan.runs = find_runs(index);
  const int64_t count = static_cast<int64_t>(index.size());
  const bool long_runs = count * job.element_size >= kRunBytes * static_cast<int64_t>(plan.runs.size());
  if (!long_runs) {
    plan.runs.clear();
    const bool increasing = std::adjacent_find(index.begin(), index.end(), std::greater_equal<>()) == index.end();
    // Below one channel in eight most masks are nearly empty and picking is as fast.
    if (has_compress() && increasing && count * 8 >= job.columns) {
      plan.lanes = 64 / job.element_size;
      plan.masks.assign((job.columns + plan.lanes - 1) / plan.lanes, 0);
      for (const int32_t channel : index) plan.masks[channel / plan.lanes] |= 1u << channel % plan.lanes;
    }
  }
  plan.index = std::move(index);
  return plan;
}

#ifdef PPF_X86
#define PPF_COMPRESS __attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt")))

// Both write up to 64 bytes past the last kept element; `columns` bounds the reads.
PPF_COMPRESS void compress(uint16_t* out, const uint16_t* row, const std::vector<uint32_t>& masks, int64_t columns) {
  const int64_t whole = columns / 32;
  for (int64_t i = 0; i < whole; ++i) {
    const __m512i held = _mm512_loadu_si512(row + 32 * i);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(masks[i], held));
    out += __builtin_popcount(masks[i]);
  }
  if (columns % 32 != 0) {
    const __m512i held = _mm512_maskz_loadu_epi16((1u << columns % 32) - 1, row + 32 * whole);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(masks[whole], held));
  }
}

PPF_COMPRESS void compress(uint32_t* out, const uint32_t* row, const std::vector<uint32_t>& masks, int64_t columns) {
  const int64_t whole = columns / 16;
  for (int64_t i = 0; i < whole; ++i) {
    const __m512i held = _mm512_loadu_si512(row + 16 * i);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(masks[i]), held));
    out += __builtin_popcount(masks[i]);
  }
  if (columns % 16 != 0) {
    const __m512i held = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << columns % 16) - 1), row + 16 * whole);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(masks[whole]), held));
  }
}
#endif

// Runs shorter than this are over before a hardware prefetcher has caught on.
constexpr int64_t kShortRun = 4096;
// What is fetched of the row that comes next, longer than that: enough for a prefetcher to see where it goes.
constexpr int64_t kRowStart = 1024;

void fetch_ahead(const void* run, int64_t bytes) {
  if (bytes >= kShortRun) return;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(run) + at);
}

// Hardware prefetchers cannot follow scattered picks, so each part of a row is picked while the same part of the row
// that comes next, `ahead`, is fetched in order.
template <class Element>
void pick(Element* out, const Element* row, const char* ahead, int64_t row_bytes, const std::vector<int32_t>& index) {
  constexpr int64_t kPart = 256;
  const int64_t count = static_cast<int64_t>(index.size());
  const int64_t share = (row_bytes * kPart + count - 1) / count;
  const int32_t* at = index.data();
  for (int64_t part = 0, fetched = 0; part < count; part += kPart) {
    for (const int64_t end = std::min(row_bytes, fetched + share); fetched < end; fetched += 64) {
      __builtin_prefetch(ahead + fetched, 0, 2);
    }
    const int64_t end = std::min(count, part + kPart);
    int64_t i = part;
    for (; i + 8 <= end; i += 8) {
      Element held[8];
      for (int k = 0; k < 8; ++k) held[k] = row[at[i + k]];
      std::memcpy(out + i, held, sizeof held);
    }
    for (; i < end; ++i) out[i] = row[at[i]];
  }
}

#ifdef PPF_X86
// Below one channel in eight a pick is cheaper than turning whole rows.
bool worth_blocks(const GatherJob& job, const ColumnPlan& plan) {
  return plan.runs.empty() && plan.masks.empty() && job.count * 8 >= job.columns;
}
#endif

// Picks [first, last) in blocks of rows; returns the first row that is left.
template <class Element>
int64_t block_range(const GatherJob& job, const ColumnPlan& plan, bool stream, int64_t first, int64_t last) {
#ifdef PPF_X86
  if (!worth_blocks(job, plan)) return first;
  constexpr int kRows = BlockPicker<Element>::kRows;
  if (last - first < kRows) return first;
  BlockPicker<Element> picker(plan.index, job.columns);
  const int64_t bytes = job.count * static_cast<int64_t>(sizeof(Element));
  for (; first + kRows <= last; first += kRows) {
    picker.pick(static_cast<const Element*>(job.source) + first * job.source_stride, job.source_stride);
    for (int row = 0; row < kRows; ++row) {
      Element* target = static_cast<Element*>(job.target) + (first + row) * job.target_stride;
      copy_bytes(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(picker.picked(row)), bytes, stream);
    }
  }
#endif
  return first;
}

template <class Element>
void column_range(const GatherJob& job, const ColumnPlan& plan, bool stream, int64_t first, int64_t last) {
  first = block_range<Element>(job, plan, stream, first, last);
  const int64_t bytes = job.count * static_cast<int64_t>(sizeof(Element));
  const std::unique_ptr<Element[]> buffer(new Element[job.count + 64 / sizeof(Element)]);
  for (int64_t row = first; row < last; ++row) {
    const Element* source = static_cast<const Element*>(job.source) + row * job.source_stride;
    Element* target = static_cast<Element*>(job.target) + row * job.target_stride;
    if (!plan.runs.empty()) {
      const int64_t next_row = row + 1 < last ? job.source_stride : 0;
      for (const Run& run : plan.runs) {
        fetch_ahead(source + next_row + run.start, run.length * static_cast<int64_t>(sizeof(Element)));
        copy_bytes(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(source + run.start),
                   run.length * static_cast<int64_t>(sizeof(Element)), stream);
        target += run.length;
      }
      continue;
    }
#ifdef PPF_X86
    if (!plan.masks.empty()) {
      compress(buffer.get(), source, plan.masks, job.columns);
    } else
#endif
    {
      const char* ahead = reinterpret_cast<const char*>(row + 1 < last ? source + job.source_stride : source);
      pick(buffer.get(), source, ahead, job.columns * static_cast<int64_t>(sizeof(Element)), plan.index);
    }
    copy_bytes(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(buffer.get()), bytes, stream);
  }
  finish_stream();
}

void row_range(const GatherJob& job, const std::vector<int32_t>& index, bool stream, int64_t first, int64_t last) {
  const int64_t size = job.element_size, bytes = job.columns * size;
  const auto source = [&](int64_t row) {
    return static_cast<const char*>(job.source) + index[row] * job.source_stride * size;
  };
  for (int64_t row = first; row < last; ++row) {
    if (row + 1 < last) fetch_ahead(source(row + 1), std::min(bytes, kRowStart));
    copy_bytes(static_cast<char*>(job.target) + row * job.target_stride * size, source(row), bytes, stream);
  }
  finish_stream();
}

// Splits [0, rows) over threads; an exception of any of them (only bad_alloc is possible) reaches the caller.
template <class Work>
void parallel(int64_t rows, int threads, const Work& work) {
  if (threads <= 1) return work(int64_t{0}, rows);
  std::vector<std::exception_ptr> errors(threads);
  std::vector<std::thread> workers;
  const auto guarded = [&](int t) {
    try {
      work(rows * t / threads, rows * (t + 1) / threads);
    } catch (...) {
      errors[t] = std::current_exception();
    }
  };
  workers.reserve(threads);
  for (int t = 1; t < threads; ++t) {
    try {
      workers.emplace_back(guarded, t);
    } catch (const std::system_error&) {  // no more threads to be had: do this share here
      guarded(t);
    }
  }
  guarded(0);
  for (std::thread& worker : workers) worker.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace

const char* simd_level() { return has_compress() ? "avx512-vbmi2" : "scalar"; }

void gather_cpu(const GatherJob& job, const char* index_name, int threads) {
  std::vector<int32_t> index(job.count);
  pack_index(index_name, job.index, job.index_size, job.count, job.dim == 0 ? job.rows : job.columns, index.data());
  const int64_t rows = job.dim == 0 ? job.count : job.rows;
  const int64_t bytes = rows * (job.dim == 0 ? job.columns : job.count) * job.element_size;
  if (bytes == 0) return;
  const bool stream = bytes >= kStreamBytes;
  if (stream && job.target_stride == (job.dim == 0 ? job.columns : job.count)) expect_large(job.target, bytes);
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, bytes / kBytesPerThread, rows})));
  if (job.dim == 0) {
    return parallel(rows, threads, [&](int64_t first, int64_t last) { row_range(job, index, stream, first, last); });
  }
  const ColumnPlan plan = plan_columns(job, std::move(index));
  parallel(rows, threads, [&](int64_t first, int64_t last) {
    if (job.element_size == 2) {
      column_range<uint16_t>(job, plan, stream, first, last);
    } else {
      column_range<uint32_t>(job, plan, stream, first, last);
    }
  });
}

}  // namespace ppf
