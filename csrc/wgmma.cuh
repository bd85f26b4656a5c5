// Hopper's matrix units: m64nNk16 products of 16-bit tiles in shared memory, and their descriptors. For files compiled
// for sm_90a only.
#pragma once

#include <cstdint>

namespace ppf {

// A tile in shared memory, rows of 128 bytes whose 16-byte pieces are permuted by the row number (128-byte swizzle),
// 1024-byte aligned; the contraction runs along the rows, and 8 rows take 1024 bytes.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  const uint64_t swizzle = uint64_t{1} << 62;
  return (address >> 4 & 0x3fff) | uint64_t{16 >> 4} << 16 | uint64_t{1024 >> 4} << 32 | swizzle;
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Ordinary writes to shared memory that were waited for become visible to the matrix units.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// d [64 tokens, kWide] += a · b, fp32, one warpgroup; `scale` 0 starts from zero. Register lists cannot be built
// by templates, so the text of each width is put together by macros.
template <int kWide, bool kHalf>
__device__ __forceinline__ void wgmma(float (&d)[kWide / 2], uint64_t a, uint64_t b, int scale);

#define PPF_S0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define PPF_S1 "%8,%9,%10,%11,%12,%13,%14,%15"
#define PPF_S2 "%16,%17,%18,%19,%20,%21,%22,%23"
#define PPF_S3 "%24,%25,%26,%27,%28,%29,%30,%31"
#define PPF_S4 "%32,%33,%34,%35,%36,%37,%38,%39"
#define PPF_S5 "%40,%41,%42,%43,%44,%45,%46,%47"
#define PPF_S6 "%48,%49,%50,%51,%52,%53,%54,%55"
#define PPF_S7 "%56,%57,%58,%59,%60,%61,%62,%63"
#define PPF_S8 "%64,%65,%66,%67,%68,%69,%70,%71"
#define PPF_S9 "%72,%73,%74,%75,%76,%77,%78,%79"
#define PPF_S10 "%80,%81,%82,%83,%84,%85,%86,%87"
#define PPF_S11 "%88,%89,%90,%91,%92,%93,%94,%95"
#define PPF_S12 "%96,%97,%98,%99,%100,%101,%102,%103"
#define PPF_S13 "%104,%105,%106,%107,%108,%109,%110,%111"
#define PPF_S14 "%112,%113,%114,%115,%116,%117,%118,%119"
#define PPF_S15 "%120,%121,%122,%123,%124,%125,%126,%127"
#define PPF_LIST1 PPF_S0
#define PPF_LIST2 PPF_LIST1 "," PPF_S1
#define PPF_LIST3 PPF_LIST2 "," PPF_S2
#define PPF_LIST4 PPF_LIST3 "," PPF_S3
#define PPF_LIST5 PPF_LIST4 "," PPF_S4
#define PPF_LIST6 PPF_LIST5 "," PPF_S5
#define PPF_LIST7 PPF_LIST6 "," PPF_S6
#define PPF_LIST8 PPF_LIST7 "," PPF_S7
#define PPF_LIST9 PPF_LIST8 "," PPF_S8
#define PPF_LIST10 PPF_LIST9 "," PPF_S9
#define PPF_LIST11 PPF_LIST10 "," PPF_S10
#define PPF_LIST12 PPF_LIST11 "," PPF_S11
#define PPF_LIST13 PPF_LIST12 "," PPF_S12
#define PPF_LIST14 PPF_LIST13 "," PPF_S13
#define PPF_LIST15 PPF_LIST14 "," PPF_S14
#define PPF_LIST16 PPF_LIST15 "," PPF_S15
#define PPF_D(i) "+f"(d[i]), "+f"(d[i+1]), "+f"(d[i+2]), "+f"(d[i+3]), "+f"(d[i+4]), "+f"(d[i+5]), "+f"(d[i+6]), "+f"(d[i+7])
#define PPF_OUT1 PPF_D(0)
#define PPF_OUT2 PPF_OUT1, PPF_D(8)
#define PPF_OUT3 PPF_OUT2, PPF_D(16)
#define PPF_OUT4 PPF_OUT3, PPF_D(24)
#define PPF_OUT5 PPF_OUT4, PPF_D(32)
#define PPF_OUT6 PPF_OUT5, PPF_D(40)
#define PPF_OUT7 PPF_OUT6, PPF_D(48)
#define PPF_OUT8 PPF_OUT7, PPF_D(56)
#define PPF_OUT9 PPF_OUT8, PPF_D(64)
#define PPF_OUT10 PPF_OUT9, PPF_D(72)
#define PPF_OUT11 PPF_OUT10, PPF_D(80)
#define PPF_OUT12 PPF_OUT11, PPF_D(88)
#define PPF_OUT13 PPF_OUT12, PPF_D(96)
#define PPF_OUT14 PPF_OUT13, PPF_D(104)
#define PPF_OUT15 PPF_OUT14, PPF_D(112)
#define PPF_OUT16 PPF_OUT15, PPF_D(120)

#define PPF_WGMMA_OF(WIDE, EIGHTS, A, B, SCALE, TYPE, HALF)                                                      \
  template <>                                                                                                    \
  __device__ __forceinline__ void wgmma<WIDE, HALF>(float (&d)[WIDE / 2], uint64_t a, uint64_t b, int scale) {   \
    asm volatile(                                                                                                \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %" SCALE ", 0;\n"                                                   \
        "wgmma.mma_async.sync.aligned.m64n" #WIDE "k16.f32." TYPE "." TYPE " {" PPF_LIST##EIGHTS "}, %" A ", %" B  \
        ", add, 1, 1, 0, 0;\n}\n"                                                                                \
        : PPF_OUT##EIGHTS                                                                                        \
        : "l"(a), "l"(b), "r"(scale));                                                                           \
  }
#define PPF_WGMMA_WIDE(WIDE, EIGHTS, A, B, SCALE)               \
  PPF_WGMMA_OF(WIDE, EIGHTS, A, B, SCALE, "bf16", false)        \
  PPF_WGMMA_OF(WIDE, EIGHTS, A, B, SCALE, "f16", true)
PPF_WGMMA_WIDE(128, 8, "64", "65", "66")
PPF_WGMMA_WIDE(144, 9, "72", "73", "74")
PPF_WGMMA_WIDE(160, 10, "80", "81", "82")
PPF_WGMMA_WIDE(176, 11, "88", "89", "90")
PPF_WGMMA_WIDE(192, 12, "96", "97", "98")
PPF_WGMMA_WIDE(208, 13, "104", "105", "106")
PPF_WGMMA_WIDE(224, 14, "112", "113", "114")
PPF_WGMMA_WIDE(240, 15, "120", "121", "122")
PPF_WGMMA_WIDE(256, 16, "128", "129", "130")

}  // namespace ppf
