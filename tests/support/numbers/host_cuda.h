// The words of CUDA that kernels use, and one that MLX defines.
#define inf __builtin_inff()
#define __device__
#define __forceinline__ inline
#define __shared__
#define threadIdx this_thread
#define blockIdx this_block
#define gridDim all_blocks

static inline void __syncthreads() { meet_block(); }
static inline float __shfl_xor_sync(unsigned, float value, int mask) { return shuffle_xor(value, mask); }
static inline unsigned atomicAdd(unsigned* cell, unsigned value) {
  const unsigned before = *cell;
  *cell += value;
  return before;
}
static inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
static inline float16 __ushort_as_half(unsigned short bits) { return same_bits<float16>(bits); }
static inline float __half2float(float16 value) { return value; }
static inline int __ffs(int word) { return __builtin_ffs(word); }
static inline float exp2f(float x) { return __builtin_exp2f(x); }

// mma.sync.aligned.m16n8k16.row.col.f32: sums of 16 rows of 16 numbers by 8 columns of as many.
template <typename T>
static inline void multiply(float* sums, const unsigned* own) {
  const unsigned (*given)[WORDS] = give_words(own);
  const unsigned lane = this_thread.x % 32, group = lane / 4, quarter = lane % 4;
  for (unsigned j = 0; j < 4; ++j) {
    const unsigned row = group + j / 2 * 8, column = quarter * 2 + j % 2;
    float sum = 0.0f;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned of = k % 8 / 2, half = k / 8, shift = k % 2 * 16;
      const unsigned left = given[row % 8 * 4 + of][row / 8 + 2 * half] >> shift;
      const unsigned right = given[column * 4 + of][4 + half] >> shift;
      sum += float(same_bits<T>(uint16_t(left))) * float(same_bits<T>(uint16_t(right)));
    }
    sums[j] += sum;
  }
}

template <typename T>
using Small = const T*;
