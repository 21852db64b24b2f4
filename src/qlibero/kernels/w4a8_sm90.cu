// W4A8 matrix product for Hopper (sm_90a), exact in integers; `cuda_w4a8.py` says what it is, `cuda_plan.py` how it is cut.
//
//     out[m, n] = (float(sum_k x[m, k] w[n, k]) * s_x[m]) * s_w[n] + bias[n]      fp32, rounded after every step
//
// Computed transposed, with wgmma m64nNk32.s8: weights are the first operand, from registers; tokens the second, from
// shared memory. int4 codes are unpacked as 16 w, (p << 4) & 0xF0F0F0F0 and p & 0xF0F0F0F0; the 16 leaves through the
// epilogue's scale, 2^-4 being exact.
//
// Layouts, neither of which depends on the tile:
//   w: [N/128][K/64][2 halves of 64 rows][128 threads][16 bytes]: a thread's bytes are its fragments of two k32 steps. The
//      128 rows are permuted so that a thread ends up with 4 consecutive outputs of a token: its stores need no transpose.
//   x: [K/128][ceil(M/8)][8 tokens][128 bytes], 16-byte chunk c of token r at c ^ r (tiled.py): tiles of any multiple of 8
//      tokens are one contiguous copy.
//
// One CTA per multiprocessor, persistent: one producer thread (bulk copies, mbarriers) and HALVES warpgroups of 128 outputs
// x BN tokens. KS > 1: a cluster of KS CTAs cuts K; integer partial sums go through distributed shared memory and each CTA
// finishes 1/KS of the token columns. Integers: the order of summation cannot matter. One tile a cluster then.
//
// The source includes nothing, so that NVRTC needs nothing but it and the generated `Wgmma` (cuda_plan.py puts it first).

#define DEV __device__ __forceinline__

struct Params {
  const uint8_t* w; const uint8_t* x; const float* sx; const float* sw; const float* bias; void* out;
  int M, N, K, groups;         // groups = ceil(M / 8), what x has
  int token_tiles, tiles;      // ceil(M / BN); token_tiles * N / BM
  int band;                    // weight tiles per band of the tile order
};
enum { BF16 = 0, FP32 = 1, INT32 = 2 };  // what `out` holds; INT32: the sums themselves

DEV uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DEV void mbar_init(uint32_t b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n)); }
DEV void mbar_expect(uint32_t b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}
DEV void mbar_wait(uint32_t b, int parity) {
  asm volatile("{ .reg .pred p;\nL%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D%=;\nbra L%=;\nD%=: }"
               ::"r"(b), "r"(parity) : "memory");
}
// Every lane arrives for itself: its reads are ordered before the producer's next write to the slot without help of a
// warp barrier, which is also what compute-sanitizer's racecheck can follow.
DEV void mbar_arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
DEV void bulk(uint32_t dst, const void* src, int bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory");
}
DEV void cluster_sync() { asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory"); }
DEV void lds128(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a));
}
DEV void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEV void wg_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
DEV void remote_st128(uint32_t a, int cta, const int* v) {
  asm volatile("{ .reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; st.shared::cluster.v4.b32 [r], {%2,%3,%4,%5}; }"
               ::"r"(a), "r"(cta), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
DEV uint32_t bf16x2(float lo, float hi) {
  uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r;
}
// Unpacked here and not after the fence, or the compiler serializes the products.
DEV void pin(uint32_t (&r)[4]) { asm volatile("" : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3]) :: "memory"); }

// All K-blocks of one tile for one warpgroup: acc = W (128 rows) X^T (BN tokens). Two groups of products are in flight
// while the next fragments are loaded and unpacked. A stage is released once its last products are known to be done.
template <int BN, int NR, int STAGES, int STAGE>
DEV void mainloop(int (&acc)[2][NR], int blocks, int& stage, int& phase, uint32_t w_addr, uint32_t x_desc, uint32_t full,
                  uint32_t empty) {
  auto mma = [&](int (&d)[NR], const uint32_t (&a)[4], uint64_t b, int keep) {
    Wgmma<BN>::mma(d, a, b, keep);
    wg_commit();
  };
  auto release = [&](int of) { mbar_arrive(empty + 8 * (of == 0 ? STAGES - 1 : of - 1)); };  // the stage before `of`
  int keep = 0;
  for (int k = 0; k < blocks; k++) {
    mbar_wait(full + 8 * stage, phase);
    const uint32_t wa = w_addr + stage * STAGE;
    // descriptor: 128-byte swizzle (1 << 62), 1024 bytes between groups of 8 tokens, leading offset unused
    const uint64_t desc = (1ull << 62) | (64ull << 32) | (1ull << 16) | (x_desc + ((stage * STAGE) >> 4));
    #pragma unroll
    for (int c = 0; c < 2; c++) {
      uint32_t p0[4], p1[4], l0[4], l1[4];
      lds128(p0, wa + c * 4096);
      lds128(p1, wa + c * 4096 + 2048);
      wg_wait<2>();
      #pragma unroll
      for (int i = 0; i < 4; i++) { l0[i] = (p0[i] << 4) & 0xF0F0F0F0u; l1[i] = (p1[i] << 4) & 0xF0F0F0F0u; }
      pin(l0); pin(l1);
      wg_fence();
      mma(acc[0], l0, desc + c * 4, keep);
      mma(acc[1], l1, desc + c * 4, keep);
      keep = 1;
      #pragma unroll
      for (int i = 0; i < 4; i++) { p0[i] &= 0xF0F0F0F0u; p1[i] &= 0xF0F0F0F0u; }
      wg_wait<2>();
      if (c == 0 && k != 0) release(stage);
      pin(p0); pin(p1);
      wg_fence();
      mma(acc[0], p0, desc + c * 4 + 2, 1);
      mma(acc[1], p1, desc + c * 4 + 2, 1);
    }
    if (++stage == STAGES) { stage = 0; phase ^= 1; }
  }
  wg_wait<0>();
  release(stage);
}

template <int HALVES, int BN, int STAGES, int KS, int OUT, int BIAS>
DEV void gemm(const Params& p) {
  constexpr int BM = HALVES * 128, NR = BN / 2, NJ = NR / 4;
  constexpr int X_BYTES = BN * 128, W_BYTES = BM * 64, STAGE = X_BYTES + W_BYTES;
  constexpr int SLOTS = 2, SLOT = (BN + BM) * 4;  // scales of the tile at work and of the next
  constexpr int JS = (NJ + KS - 1) / KS;          // groups of 8 tokens that each CTA of a cluster finishes
  static_assert(KS == 1 || KS * HALVES * JS * 4096 <= STAGES * STAGE, "the exchange does not fit");
  extern __shared__ __align__(1024) uint8_t smem_raw[];
  const uint32_t smem = smem_u32(smem_raw), scales = smem + STAGES * STAGE;
  const uint32_t full = scales + SLOTS * SLOT, empty = full + 8 * STAGES, freed = empty + 8 * STAGES;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, wg = warp >> 2;  // uniform, and known to be
  const int rank = blockIdx.x % KS;  // the rank in the cluster, and known to be uniform
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) { mbar_init(full + 8 * i, 1); mbar_init(empty + 8 * i, HALVES * 128); }
    for (int i = 0; i < SLOTS; i++) mbar_init(freed + 8 * i, HALVES * 128);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int workers = gridDim.x / KS, worker = blockIdx.x / KS, kb = p.K >> 7, weight_tiles = p.N / BM;
  const int k0 = rank * kb / KS, blocks = (rank + 1) * kb / KS - k0;

  // tile -> weight tile and first token: bands of weight tiles, within a band all token tiles, weights fastest
  auto place = [&](int tile, int& wt, int& m0) {
    const int per = p.band * p.token_tiles, b = tile / per, r = tile - b * per;
    const int h = min(p.band, weight_tiles - b * p.band), mt = r / h;
    wt = b * p.band + r - mt * h;
    m0 = mt * BN;
  };

  if (wg == HALVES) {  // ---- producer
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == HALVES * 4 && lane == 0) {
      int stage = 0, phase = 0, early = min(STAGES, blocks), slot = 0, slot_phase = 0;
      for (int tile = worker; tile < p.tiles; tile += workers) {
        int wt, m0;
        place(tile, wt, m0);
        const int rows = min(BN >> 3, p.groups - (m0 >> 3));      // groups that exist; the rest is never stored
        const int sx_bytes = min(BN, (p.M - m0 + 3) & ~3) * 4;    // whole 16 bytes
        const size_t w_row = (size_t)(p.K >> 6) * 4096;           // bytes of 128 outputs
        const uint8_t* wsrc = p.w + (size_t)wt * HALVES * w_row + (size_t)k0 * 8192;
        const uint8_t* xsrc = p.x + ((size_t)k0 * p.groups + (m0 >> 3)) * 1024;
        auto weights = [&](int st, const uint8_t* src, bool first) {
          mbar_expect(full + 8 * st, W_BYTES + rows * 1024 + (first ? sx_bytes + BM * 4 : 0));
          #pragma unroll
          for (int i = 0; i < HALVES; i++) bulk(smem + st * STAGE + X_BYTES + i * 8192, src + i * w_row, 8192, full + 8 * st);
        };
        if (early > 0) {  // weights do not depend on the kernel before this one: ask for them at once
          for (int i = 0; i < early; i++) weights(i, wsrc + i * 8192, i == 0);
          asm volatile("griddepcontrol.wait;" ::: "memory");
        }
        for (int k = 0; k < blocks; k++) {
          const uint32_t bar = full + 8 * stage;
          if (k == 0) mbar_wait(freed + 8 * slot, slot_phase ^ 1);  // the scales of the tile before last have been used
          if (early > 0) early--;
          else { mbar_wait(empty + 8 * stage, phase ^ 1); weights(stage, wsrc, k == 0); }
          bulk(smem + stage * STAGE, xsrc, rows * 1024, bar);
          if (k == 0) {
            const uint32_t dst = scales + slot * SLOT;
            bulk(dst, p.sx + m0, sx_bytes, bar);
            bulk(dst + BN * 4, p.sw + wt * BM, BM * 4, bar);
            slot ^= 1; slot_phase ^= slot == 0;
          }
          wsrc += 8192; xsrc += (size_t)p.groups * 1024;
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
      }
    }
    if (KS > 1) { __syncwarp(); cluster_sync(); cluster_sync(); }
    return;
  }
  // ---- consumers
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int tid = threadIdx.x & 127;
  int acc[2][NR];
  int stage = 0, phase = 0;
  uint32_t slot = scales;
  const uint32_t w_addr = smem + X_BYTES + wg * 8192 + tid * 16;
  for (int tile = worker; tile < p.tiles; tile += workers) {
    mainloop<BN, NR, STAGES, STAGE>(acc, blocks, stage, phase, w_addr, smem >> 4, full, empty);

    asm volatile("" : "+r"(tile));  // compute the place again rather than hold it in registers through the products
    int wt, m0;
    place(tile, wt, m0);
    const int n_in = wg * 128 + (warp & 3) * 32 + (lane >> 2) * 4, t_in = (lane & 3) * 2;
    const int last = min(p.M - m0, BN) - t_in;  // tokens of this thread's columns that exist
    const size_t first = (size_t)(m0 + t_in) * p.N + wt * BM + n_in;
    float sw[4], bias[4];
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(sw[0]), "=f"(sw[1]), "=f"(sw[2]), "=f"(sw[3]) : "r"(slot + BN * 4 + n_in * 4));
    if (BIAS) {
      #pragma unroll
      for (int i = 0; i < 4; i++) bias[i] = p.bias[wt * BM + n_in + i];
    }
    auto outputs = [&](int j, const int (&v)[8]) {
      float sx[2];
      asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(sx[0]), "=f"(sx[1]) : "r"(slot + (t_in + j * 8) * 4));
      #pragma unroll
      for (int t = 0; t < 2; t++) {
        if (j * 8 + t >= last) continue;
        const size_t at = first + (size_t)(j * 8 + t) * p.N;
        int sum[4];
        float y[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = v[(i >> 1) * 4 + (i & 1) * 2 + t];
        if (OUT == INT32) {
          *reinterpret_cast<int4*>((int*)p.out + at) = make_int4(sum[0] >> 4, sum[1] >> 4, sum[2] >> 4, sum[3] >> 4);
          continue;
        }
        const float f = sx[t] * 0.0625f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
          y[i] = __fmul_rn(__fmul_rn(__int2float_rn(sum[i]), f), sw[i]);
          if (BIAS) y[i] = __fadd_rn(y[i], bias[i]);
        }
        if (OUT == FP32) *reinterpret_cast<float4*>((float*)p.out + at) = make_float4(y[0], y[1], y[2], y[3]);
        else *reinterpret_cast<uint2*>((uint16_t*)p.out + at) = make_uint2(bf16x2(y[0], y[1]), bf16x2(y[2], y[3]));
      }
    };
    if (KS == 1) {
      #pragma unroll
      for (int j = 0; j < NJ; j++) {
        int v[8];
        #pragma unroll
        for (int i = 0; i < 8; i++) v[i] = acc[i >> 2][j * 4 + (i & 3)];
        outputs(j, v);
      }
    } else {
      cluster_sync();  // every CTA's products are done: stages may be overwritten
      #pragma unroll
      for (int j = 0; j < NJ; j++) {
        const uint32_t dst = smem + ((rank * HALVES + wg) * JS + j % JS) * 4096 + tid * 16;
        #pragma unroll
        for (int h = 0; h < 2; h++) remote_st128(dst + h * 2048, j / JS, &acc[h][j * 4]);
      }
      cluster_sync();
      for (int jj = 0; jj < JS && rank * JS + jj < NJ; jj++) {
        int v[8] = {};
        #pragma unroll
        for (int s = 0; s < KS; s++)
          #pragma unroll
          for (int h = 0; h < 2; h++) {
            uint32_t r[4];
            lds128(r, smem + ((s * HALVES + wg) * JS + jj) * 4096 + h * 2048 + tid * 16);
            #pragma unroll
            for (int i = 0; i < 4; i++) v[h * 4 + i] += (int)r[i];
          }
        outputs(rank * JS + jj, v);
      }
    }
    mbar_arrive(freed + (slot == scales ? 0 : 8));
    slot = scales * 2 + SLOT - slot;
  }
}
