// smooth_hadamard (hadamard.py) and its quantizer for Hopper in one launch: y = H (x * s), scale = absmax(y) / 127,
// codes = rint(y / scale). One CTA per token; the row never leaves the chip. GATED: x is gelu(gate) * up, rounded to
// bfloat16 where torch rounds.
//
//  small: K = 128 R, T threads of C = 128 / T columns each. First all R blocks of a column are in one thread's registers;
//         one exchange through shared memory; then E = R C consecutive channels. What is missing of a block of 128 goes over
//         log2(128 / E) shuffles.
//  wide:  K = 16384, 256 threads x 64 values, three passes (3 + 6 + 5 strides), two exchanges, the second within a warp.
//         3 CTAs per multiprocessor, each takes every gridDim-th token.
//
// Every pass keeps the definition's order of strides, so every addition is the definition's.

#define DEV __device__ __forceinline__

struct Params {
  const uint16_t* x; const uint16_t* up; const uint16_t* s; uint8_t* codes; float* scales;  // bf16; up: GATED
  int M, groups, tiled;               // groups = ceil(M / 8); tiled: codes as in tiled.py, else row by row
  long long x_stride, up_stride;      // between rows
};

DEV float bf(uint32_t v) { return __uint_as_float(v << 16); }
DEV uint32_t bf16x2(float lo, float hi) {
  uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r;
}
DEV float round_bf16(float x) { return __uint_as_float(bf16x2(0.f, x) & 0xFFFF0000u); }
// torch's tanh form, with tanh as tanhf has it for large arguments (one ex2, one rcp): in bf16 the same for every input.
DEV float gelu(float x) {
  const float u = 0.7978845608028654f * fmaf(0.044715f, x * x * x, x);
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(fabsf(u) * 2.885390081777927f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(e + 1.f));
  return 0.5f * x * (1.f + copysignf(fmaf(r, -2.f, 1.f), u));
}
template <int C> constexpr int WORDS = C > 1 ? C / 2 : 1;
template <int C> DEV void load(uint32_t (&w)[WORDS<C>], const uint16_t* p) {  // C bf16, read once: not kept in L1
  if constexpr (C == 1) { uint16_t v; asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p)); w[0] = v; }
  if constexpr (C == 2) asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
  if constexpr (C == 8)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
}
DEV float half_of(const uint32_t* w, int i) { return i & 1 ? __uint_as_float(w[i >> 1] & 0xFFFF0000u) : bf(w[i >> 1]); }
template <int C> DEV void factors(const uint16_t* p, float (&s)[C]) {
  uint32_t w[WORDS<C>];
  if constexpr (C == 1) w[0] = __ldg(p);
  if constexpr (C == 2) w[0] = __ldg((const uint32_t*)p);
  if constexpr (C == 8) { const uint4 q = __ldg((const uint4*)p); w[0] = q.x; w[1] = q.y; w[2] = q.z; w[3] = q.w; }
  #pragma unroll
  for (int i = 0; i < C; i++) s[i] = half_of(w, i);
}
// R runs of C channels, `apart` channels from one another: gelu(x) * up where GATED, times s.
template <int R, int C, int GATED, class S>
DEV void load_scaled(const uint16_t* x, const uint16_t* up, int apart, float (&v)[R * C], S factors_of) {
  uint32_t raw[R][WORDS<C>];
  #pragma unroll
  for (int j = 0; j < R; j++) load<C>(raw[j], x + j * apart);
  #pragma unroll
  for (int j = 0; j < R; j++) {
    uint32_t u[WORDS<C>];
    if (GATED) load<C>(u, up + j * apart);
    float s[C];
    factors_of(j, s);
    #pragma unroll
    for (int i = 0; i < C; i++) {
      float a = half_of(raw[j], i);
      if (GATED) a = round_bf16(__fmul_rn(round_bf16(gelu(a)), half_of(u, i)));
      v[j * C + i] = __fmul_rn(a, s[i]);
    }
  }
}
// Four quotients, correctly rounded (inv = 1/s correctly rounded, one remainder step), rounded to even, as bytes.
// |y / s| <= 127.00001, so nothing is clamped.
DEV uint32_t codes4(const float* y, float s, float inv) {
  uint32_t b[4];
  #pragma unroll
  for (int i = 0; i < 4; i++) {
    float d = __fmul_rn(y[i], inv);
    d = __fmaf_rn(__fmaf_rn(-d, s, y[i]), inv, d);
    b[i] = __float_as_uint(__fadd_rn(d, 12582912.f));  // 1.5 * 2^23: the low byte is the integer
  }
  return __byte_perm(__byte_perm(b[0], b[1], 0x0040), __byte_perm(b[2], b[3], 0x0040), 0x5410);
}
DEV uint4 codes16(const float* v, float s, float inv) {
  return make_uint4(codes4(v, s, inv), codes4(v + 4, s, inv), codes4(v + 8, s, inv), codes4(v + 12, s, inv));
}
DEV float row_scale(float peak) {  // a row with anything not finite gets an infinite scale
  const float inf = __int_as_float(0x7f800000);
  return __fdiv_rn(peak < inf ? fmaxf(peak, 1e-8f) : inf, 127.f);
}
DEV uint8_t* place(const Params& p, int m, int kb, int chunk, int blocks) {  // of 16 codes: block of 128 channels, chunk in it
  return p.codes + (p.tiled ? ((size_t)kb * p.groups + (m >> 3)) * 1024 + (m & 7) * 128 + ((chunk ^ (m & 7)) << 4)
                            : ((size_t)m * blocks + kb) * 128 + chunk * 16);
}
// Maximum over the CTA's warps; bits of non-negative floats order as integers, NaN above all.
template <int T> DEV float row_peak(float peak, uint32_t* red) {
  uint32_t w = __reduce_max_sync(~0u, __float_as_uint(peak));
  if ((threadIdx.x & 31) == 0) red[threadIdx.x >> 5] = w;
  __syncthreads();
  w = red[0];
  #pragma unroll
  for (int i = 1; i < T / 32; i++) w = max(w, red[i]);
  return __uint_as_float(w);
}
DEV void butterfly(float& a, float& b) { const float x = a, y = b; a = __fadd_rn(x, y); b = __fsub_rn(x, y); }
template <int N, int FROM = N / 2> DEV void butterflies(float (&v)[N], int to = 1) {  // strides FROM to `to`
  #pragma unroll
  for (int h = FROM; h >= to; h /= 2)
    #pragma unroll
    for (int j = 0; j < N; j++)
      if (!(j & h)) butterfly(v[j], v[j + h]);
}
template <int N, int FROM = N / 2> DEV float butterflies_peak(float (&v)[N]) {  // to 1, and the result's largest magnitude
  butterflies<N, FROM>(v, 2);
  uint32_t peak = 0;
  #pragma unroll
  for (int j = 0; j < N; j += 4) {  // max(|a + b|, |a - b|) = |a| + |b|, rounding being monotonic
    peak = __vimax3_u32(peak, __float_as_uint(__fadd_rn(fabsf(v[j]), fabsf(v[j + 1]))),
                        __float_as_uint(__fadd_rn(fabsf(v[j + 2]), fabsf(v[j + 3]))));
    butterfly(v[j], v[j + 1]);
    butterfly(v[j + 2], v[j + 3]);
  }
  return __uint_as_float(peak);
}
DEV void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEV void wait_for_input() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <int T, int R, int GATED>
DEV void small(const Params& p) {
  constexpr int C = 128 / T, E = R * C, LANES = 128 / E;
  static_assert(E == 8 || E == 16 || E >= 32, "runs of codes are stored 8 or 16 at a time");
  extern __shared__ __align__(16) uint8_t smem[];  // R * 128 floats: row j, chunk of 4 floats c at c ^ swizzle(j, c); later codes
  __shared__ uint32_t red[T / 32];
  const int t = threadIdx.x, m = blockIdx.x;
  auto swizzle = [](int j, int c) { return E == 32 ? (c >> 3 & 3) | (j & 1) << 2 : c >> 3 & 3; };
  float sv[R][C];  // does not depend on the kernel before this one
  #pragma unroll
  for (int j = 0; j < R; j++) factors<C>(p.s + t * C + j * 128, sv[j]);
  wait_for_input();
  float v[E];
  load_scaled<R, C, GATED>(p.x + m * p.x_stride + t * C, p.up + m * p.up_stride + t * C, 128, v, [&](int j, float (&s)[C]) {
    #pragma unroll
    for (int i = 0; i < C; i++) s[i] = sv[j][i];
  });
  butterflies<E>(v, C);  // strides K/2 .. 128
  // ---- exchange: columns to runs of E consecutive channels
  float* const sm = (float*)smem;
  const int c0 = t * C >> 2, in = t * C & 3;
  #pragma unroll
  for (int j = 0; j < R; j++) {
    float* const d = sm + j * 128 + ((c0 ^ swizzle(j, c0)) << 2) + in;
    if constexpr (C == 1) *d = v[j];
    if constexpr (C == 2) *(float2*)d = make_float2(v[j * 2], v[j * 2 + 1]);
  }
  __syncthreads();
  let_next_start();
  const int kb = t / LANES, part = t % LANES;  // block of 128 channels, which run of E in it
  #pragma unroll
  for (int i = 0; i < E / 4; i++) {
    const int c = part * (E / 4) + i;
    const float4 q = *(const float4*)(sm + kb * 128 + (c ^ swizzle(kb, c)) * 4);
    v[i * 4] = q.x; v[i * 4 + 1] = q.y; v[i * 4 + 2] = q.z; v[i * 4 + 3] = q.w;
  }
  #pragma unroll
  for (int l = LANES / 2; l > 0; l /= 2) {
    const float sign = t & l ? -1.f : 1.f;
    #pragma unroll
    for (int j = 0; j < E; j++) v[j] = __fmaf_rn(v[j], sign, __shfl_xor_sync(~0u, v[j], l));  // own * +-1 is exact: one rounding
  }
  const float peak = butterflies_peak<E>(v);
  const float s = row_scale(row_peak<T>(peak, red)), inv = __frcp_rn(s);
  if (t == 0) p.scales[m] = s;
  if constexpr (E == 8) {
    *(uint2*)(place(p, m, kb, part >> 1, R) + (part & 1) * 8) = make_uint2(codes4(v, s, inv), codes4(v + 4, s, inv));
  } else if constexpr (E == 16) {
    *(uint4*)place(p, m, kb, part, R) = codes16(v, s, inv);
  } else {  // through shared memory (each warp its own part, after row_peak's barrier), so that 8 lanes store 128 bytes
    constexpr int PER_WARP = 32 / LANES;  // blocks of 128 codes of a warp
    uint4* const st = (uint4*)smem + (t >> 5) * PER_WARP * 8;
    const int lane = t & 31, own = kb % PER_WARP;
    #pragma unroll
    for (int c = 0; c < E / 16; c++) st[own * 8 + ((part * (E / 16) + c) ^ (own & 7))] = codes16(v + c * 16, s, inv);
    __syncwarp();
    #pragma unroll
    for (int i = 0; i < PER_WARP / 4; i++) {
      const int b = i * 4 + (lane >> 3), c = lane & 7;
      *(uint4*)place(p, m, (t >> 5) * PER_WARP + b, c, R) = st[b * 8 + (c ^ (b & 7))];
    }
  }
}

template <int GATED>
DEV void wide(const Params& p) {
  extern __shared__ __align__(16) uint8_t smem[];  // 16384 floats; channel c at c with bits 2-4 ^= bits 6-8, bit 2 ^= bit 5
  __shared__ uint32_t red[8];
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  float* const sm = (float*)smem;
  float* const row = sm + warp * 2048;
  wait_for_input();
  for (int m = blockIdx.x; m < p.M; m += gridDim.x) {
    float v[64];
    load_scaled<8, 8, GATED>(p.x + m * p.x_stride + t * 8, p.up + m * p.up_stride + t * 8, 2048, v,
                             [&](int j, float (&s)[8]) { factors<8>(p.s + t * 8 + j * 2048, s); });
    butterflies<64>(v, 8);  // strides 8192, 4096, 2048
    if (m != blockIdx.x) __syncthreads();  // everyone has read the codes of the token before
    const int w0 = t * 8 ^ ((t >> 1) & 28) ^ (t & 4);  // channel bits 6-8 are bits 3-5 of t, bit 5 is bit 2
    #pragma unroll
    for (int j = 0; j < 8; j++) {
      *(float4*)(sm + w0 + j * 2048) = make_float4(v[j * 8], v[j * 8 + 1], v[j * 8 + 2], v[j * 8 + 3]);
      *(float4*)(sm + (w0 ^ 4) + j * 2048) = make_float4(v[j * 8 + 4], v[j * 8 + 5], v[j * 8 + 6], v[j * 8 + 7]);
    }
    __syncthreads();
    const int next = m + gridDim.x;
    if (next >= p.M) let_next_start();
    else if (t <= GATED)  // ask for the next token
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                   ::"l"(t ? p.up + next * p.up_stride : p.x + next * p.x_stride), "r"(32768) : "memory");
    // channel bits: 0-4 lane, 5-10 j, 11-13 warp
    #pragma unroll
    for (int j = 0; j < 64; j++) v[j] = row[(lane ^ (((j >> 1 & 7) ^ (j & 1)) << 2)) + j * 32];
    butterflies<64>(v);  // 1024 .. 32
    #pragma unroll
    for (int j = 0; j < 64; j++) row[(lane ^ (((j >> 1 & 7) ^ (j & 1)) << 2)) + j * 32] = v[j];
    __syncwarp();
    #pragma unroll
    for (int i = 0; i < 16; i++) {  // channels t * 64 + i * 4 ..
      const float4 q = *(const float4*)(row + lane * 64 + ((i ^ (lane & 7) ^ (i >> 3)) << 2));
      v[i * 4] = q.x; v[i * 4 + 1] = q.y; v[i * 4 + 2] = q.z; v[i * 4 + 3] = q.w;
    }
    const float peak = butterflies_peak<64, 16>(v);  // 16 .. 1
    const float s = row_scale(row_peak<256>(peak, red)), inv = __frcp_rn(s);
    if (t == 0) p.scales[m] = s;
    uint4* const st = (uint4*)row;  // 16 blocks of 128 codes of a warp
    #pragma unroll
    for (int c = 0; c < 4; c++) st[(lane >> 1) * 8 + (((lane & 1) * 4 + c) ^ (lane >> 1 & 7))] = codes16(v + c * 16, s, inv);
    __syncwarp();
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      const int b = i * 4 + (lane >> 3), c = lane & 7;
      *(uint4*)place(p, m, warp * 16 + b, c, 128) = st[b * 8 + (c ^ (b & 7))];
    }
  }
}
