// entmax of the rows of a matrix, forward and backward: a program takes a row.
#include "common.cuh"

// As backend.py lays it out.
struct RowParams {
  const void* x;
  void* p;
  const void* dp;
  void* dx;
  float* dalpha;
  const float* alpha_rows;
  long long stride_m, stride_n;  // of x, or of dp
  long long n;
  float alpha_minus_1;
};

constexpr int ROW_WARPS = 8;
constexpr int ROW_THREADS = 32 * ROW_WARPS;
constexpr int MAX_ROW_STEPS = 64;

__device__ __forceinline__ float exponent_of(const RowParams& params, long long i_row) {
  return params.alpha_rows ? params.alpha_rows[i_row] - 1 : params.alpha_minus_1;
}

// p by Newton on the norm from max z - 1: as many passes over the row as it takes.
template <class T, int ALPHA>
__global__ void __launch_bounds__(ROW_THREADS, 6) entmax_rows_fwd(const RowParams params) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* scratch = reinterpret_cast<float*>(smem);
  const long long i_row = blockIdx.x;
  const T* x = static_cast<const T*>(params.x) + i_row * params.stride_m;
  T* p_row = static_cast<T*>(params.p) + i_row * params.n;
  const float exponent = exponent_of(params, i_row);
  const float r = 1 / exponent;

  float top = -infinity();
  bool has_bad = false;
  for (long long i = threadIdx.x; i < params.n; i += ROW_THREADS) {
    const float value = to_float<T>(x[i * params.stride_n]);
    has_bad |= value != value || value == infinity();
    top = fmaxf(top, value);
  }
  has_bad = block_max<ROW_WARPS>(has_bad ? 1.0f : 0.0f, scratch) > 0;
  top = block_max<ROW_WARPS>(top, scratch);
  // A NaN, +inf, or nothing but -inf.
  has_bad |= top == -infinity();

  // Relative to the largest score, so that its magnitude costs nothing.
  float tau = -1, step = 1;
  for (int steps = 0; steps < MAX_ROW_STEPS && step > 0 && !has_bad; steps++) {
    float f = 0, g = 0;
    for (long long i = threadIdx.x; i < params.n; i += ROW_THREADS) {
      float p, w;
      powers<ALPHA>(u_of(to_float<T>(x[i * params.stride_n]) - top, exponent, tau), r, p, w);
      f += p;
      g += w;
    }
    f = block_sum<ROW_WARPS>(f, scratch);
    g = block_sum<ROW_WARPS>(g, scratch);
    step = newton_step<ALPHA>(f, g, r);
    // Below the rounding of u it is noise.
    step = step > 1.2e-7f ? step : 0.0f;
    tau += step;
  }
  for (long long i = threadIdx.x; i < params.n; i += ROW_THREADS) {
    float p, w;
    powers<ALPHA>(u_of(to_float<T>(x[i * params.stride_n]) - top, exponent, tau), r, p, w);
    p_row[i] = from_float<T>(has_bad ? not_a_number() : p);
  }
}

// w = p ** (2 - alpha) and y = (1 - alpha) log p; 0 and 0 at p = 0, NaN at NaN.
template <int ALPHA>
__device__ __forceinline__ void weights_of(float p, float exponent, float& w, float& y) {
  const float log_p = log2f(p == 0 ? 1.0f : p);
  if constexpr (ALPHA == ALPHA_1_5) {
    w = sqrtf(p);
  } else if constexpr (ALPHA == ALPHA_2) {
    w = p == 0 ? 0.0f : p - p + 1;
  } else {
    w = p == 0 ? 0.0f : exp2f((1 - exponent) * log_p);
  }
  y = -LN_2 * exponent * log_p;
}

// dx from p alone, and the gradient of the row's alpha.
template <class T, int ALPHA>
__global__ void __launch_bounds__(ROW_THREADS) entmax_rows_bwd(const RowParams params) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* scratch = reinterpret_cast<float*>(smem);
  const long long i_row = blockIdx.x;
  const T* p_row = static_cast<const T*>(params.p) + i_row * params.n;
  const T* dp_row = static_cast<const T*>(params.dp) + i_row * params.stride_m;
  T* dx = static_cast<T*>(params.dx) + i_row * params.n;
  const float exponent = exponent_of(params, i_row);

  float w_sum = 0, w_dp = 0;
  AlphaSums sums;
  for (long long i = threadIdx.x; i < params.n; i += ROW_THREADS) {
    const float p = to_float<T>(p_row[i]);
    if (p == 0) continue;
    const float dp = to_float<T>(dp_row[i * params.stride_n]);
    float w, y;
    weights_of<ALPHA>(p, exponent, w, y);
    w_sum += w;
    w_dp += w * dp;
    sums.add(y, p, dp);
  }
  w_sum = block_sum<ROW_WARPS>(w_sum, scratch);
  w_sum = w_sum == 0 ? 1.0f : w_sum;
  const float delta = block_sum<ROW_WARPS>(w_dp, scratch) / w_sum;
  for (long long i = threadIdx.x; i < params.n; i += ROW_THREADS) {
    const float p = to_float<T>(p_row[i]);
    float w, y;
    weights_of<ALPHA>(p, exponent, w, y);
    dx[i] = from_float<T>(p == 0 ? 0.0f : w * (to_float<T>(dp_row[i * params.stride_n]) - delta));
  }
  if (params.dalpha) {
    const float gradient =
        sums.gradient(exponent, w_sum, [&](float x) { return block_sum<ROW_WARPS>(x, scratch); });
    if (threadIdx.x == 0) params.dalpha[i_row] = gradient;
  }
}
