// Scattered columns of several rows at once, in host memory (x86-64). A 16-byte word holds one column of 8 rows of 2-byte
// elements (4 of 4 bytes): rows are turned into a table of such words, a pick moves one whole word, and picked words are
// turned back into rows. One load and a fraction of a shuffle per element, where picking row by row takes a load of the
// position, a load and a store each.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace ppf {

inline void transpose(__m128i (&v)[8], uint16_t) {
  __m128i pairs[8], fours[8];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
    pairs[2 * i + 1] = _mm_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
  }
  for (int half = 0; half < 8; half += 4) {
    for (int i = 0; i < 2; ++i) {
      fours[half + 2 * i] = _mm_unpacklo_epi32(pairs[half + i], pairs[half + i + 2]);
      fours[half + 2 * i + 1] = _mm_unpackhi_epi32(pairs[half + i], pairs[half + i + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = _mm_unpacklo_epi64(fours[i], fours[i + 4]);
    v[2 * i + 1] = _mm_unpackhi_epi64(fours[i], fours[i + 4]);
  }
}

inline void transpose(__m128i (&v)[4], uint32_t) {
  const __m128i a = _mm_unpacklo_epi32(v[0], v[1]), b = _mm_unpackhi_epi32(v[0], v[1]);
  const __m128i c = _mm_unpacklo_epi32(v[2], v[3]), d = _mm_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm_unpacklo_epi64(a, c);
  v[1] = _mm_unpackhi_epi64(a, c);
  v[2] = _mm_unpacklo_epi64(b, d);
  v[3] = _mm_unpackhi_epi64(b, d);
}

template <class Element>
class BlockPicker {
 public:
  static constexpr int kRows = 16 / sizeof(Element);

  BlockPicker(const std::vector<int32_t>& index, int64_t columns)
      : index_(index), columns_(columns), pitch_(static_cast<int64_t>(index.size()) + 64 / sizeof(Element)),
        table_(new Element[columns * kRows]), rows_(new Element[pitch_ * kRows]) {}

  // The picks of `kRows` rows that lie `stride` elements apart; row r of them is picked(r) until the next call.
  void pick(const Element* source, int64_t stride) {
    fill_table(source, stride);
    const int64_t count = static_cast<int64_t>(index_.size()), whole = count / kRows * kRows;
    __m128i v[kRows];
    for (int64_t i = 0; i < whole; i += kRows) {
      for (int k = 0; k < kRows; ++k) v[k] = load(table_.get() + int64_t{index_[i + k]} * kRows);
      transpose(v, Element{});
      for (int k = 0; k < kRows; ++k) store(rows_.get() + k * pitch_ + i, v[k]);
    }
    for (int64_t i = whole; i < count; ++i) {
      for (int k = 0; k < kRows; ++k) rows_[k * pitch_ + i] = table_[int64_t{index_[i]} * kRows + k];
    }
  }

  const Element* picked(int row) const { return rows_.get() + row * pitch_; }

 private:
  static __m128i load(const Element* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
  static void store(Element* at, __m128i value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), value); }

  void fill_table(const Element* source, int64_t stride) {
    const int64_t whole = columns_ / kRows * kRows;
    __m128i v[kRows];
    for (int64_t i = 0; i < whole; i += kRows) {
      for (int k = 0; k < kRows; ++k) v[k] = load(source + k * stride + i);
      transpose(v, Element{});
      for (int k = 0; k < kRows; ++k) store(table_.get() + (i + k) * kRows, v[k]);
    }
    for (int64_t i = whole; i < columns_; ++i) {
      for (int k = 0; k < kRows; ++k) table_[i * kRows + k] = source[k * stride + i];
    }
  }

  const std::vector<int32_t>& index_;
  int64_t columns_, pitch_;
  std::unique_ptr<Element[]> table_, rows_;
};

}  // namespace ppf
#endif
