// Intel's tile registers, for files that are compiled with AMX: eight of 16 rows of 64 bytes.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__AMX_BF16__)

namespace titok {
namespace {
namespace amx {

constexpr int64_t kRows = 16, kWords = 16;  // words of four bytes in a row

// While it lives, this thread's tile registers can be used. The process needs leave of the
// operating system, which detected_isa() asks for.
class Registers {
 public:
  Registers() {
    struct alignas(64) Shape {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Shape shape{};
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Registers() { asm volatile("tilerelease"); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
};

// Not the compiler's functions: GCC 12's say nothing of the memory that they read.
template <int tile>
void load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%1,%2), %%tmm%c0" ::"i"(tile), "r"(p), "r"(row_bytes) : "memory");
}
template <int tile>
void store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2)" ::"i"(tile), "r"(p), "r"(row_bytes) : "memory");
}
template <int tile>
void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// sum[r][c] += a[r][w] . b[w][c], words of pairs of bfloat16; subnormals are zeros.
template <int sum, int a, int b>
void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

// Sixteen rows of `vectors` times 16 sums, in registers 0 to vectors - 1.
template <int vectors>
struct Sums {
  static_assert(vectors >= 1 && vectors <= 4, "registers 4 to 7 are for the factors");

  template <class Each>
  static void each(const Each& fn) {
    fn(std::integral_constant<int, 0>());
    if constexpr (vectors > 1) fn(std::integral_constant<int, 1>());
    if constexpr (vectors > 2) fn(std::integral_constant<int, 2>());
    if constexpr (vectors > 3) fn(std::integral_constant<int, 3>());
  }
  static void clear() {
    each([](auto v) { zero<v>(); });
  }
  static void load(const void* p, int64_t row_bytes) {
    each([=](auto v) { amx::load<v>(static_cast<const char*>(p) + 64 * v, row_bytes); });
  }
  static void store(void* p, int64_t row_bytes) {
    each([=](auto v) { amx::store<v>(static_cast<char*>(p) + 64 * v, row_bytes); });
  }
  // += A B over `steps` words, a multiple of 16: word w of row r of A at
  // a[r * a_row + w / 16 * a_step + w % 16], row w of B at b[w * b_row].
  static void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                       int64_t steps) {
    for (int64_t w = 0; w < steps; w += kWords, a += a_step, b += kWords * b_row) {
      amx::load<4>(a, 4 * a_row);
      each([=](auto v) {
        constexpr int of_b = 5 + v % 3;
        amx::load<of_b>(b + 16 * v, 4 * b_row);
        dot<v, 4, of_b>();
      });
    }
  }
};

// Two tiles of rows times 32 sums of products of bfloat16: fewer loads than other shapes.
struct Square {
  static void clear() { Sums<4>::clear(); }
  // From and to [2][16][32].
  static void load(const float* sums) {
    amx::load<0>(sums, 128);
    amx::load<1>(sums + 16, 128);
    amx::load<2>(sums + 512, 128);
    amx::load<3>(sums + 528, 128);
  }
  static void store(float* sums) {
    amx::store<0>(sums, 128);
    amx::store<1>(sums + 16, 128);
    amx::store<2>(sums + 512, 128);
    amx::store<3>(sums + 528, 128);
  }
  // += A B of 16 words: row r of a tile of A at a[r * a_row], row w of B at b[32 w].
  static void multiply(const float* a, const float* other_a, int64_t a_row, const float* b) {
    amx::load<4>(a, 4 * a_row);
    amx::load<6>(b, 128);
    dot<0, 4, 6>();
    amx::load<7>(b + 16, 128);
    dot<1, 4, 7>();
    amx::load<5>(other_a, 4 * a_row);
    dot<2, 5, 6>();
    dot<3, 5, 7>();
  }
};

}  // namespace amx
}  // namespace
}  // namespace titok

#endif
