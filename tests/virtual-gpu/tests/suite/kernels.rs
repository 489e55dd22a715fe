//! Kernels that NVRTC made, run by cudarc on the virtual GPU and compared with references in f64.

use crate::common::{bf16s, close, data, gpu};
use cudarc::driver::{LaunchConfig, PushKernelArg};
use half::{bf16, f16};

fn grid(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

#[test]
fn rmsnorm() {
    let t = gpu("a100");
    let (rows, n, eps) = (3usize, 300i32, 1e-5f32);
    let (x, w) = (bf16s(1, rows * n as usize), data(2, n as usize));
    let (dx, dw) = (t.stream.clone_htod(&x).unwrap(), t.stream.clone_htod(&w).unwrap());
    let mut dy = t.stream.alloc_zeros::<bf16>(x.len()).unwrap();
    let f = t.kernel("rmsnorm");
    let mut b = t.stream.launch_builder(&f);
    b.arg(&dx).arg(&dw).arg(&mut dy).arg(&n).arg(&eps);
    unsafe { b.launch(grid(rows as u32, 128)) }.unwrap();
    let y = t.stream.clone_dtoh(&dy).unwrap();
    t.clean();
    for r in 0..rows {
        let row = &x[r * n as usize..][..n as usize];
        let mean = row.iter().map(|v| v.to_f64().powi(2)).sum::<f64>() / f64::from(n);
        for (i, v) in row.iter().enumerate() {
            let want = v.to_f64() / (mean + f64::from(eps)).sqrt() * f64::from(w[i]);
            // A bf16 result is within half of its last place, 2^-8 relative; the f32 sums add far less.
            close(y[r * n as usize + i].to_f64(), want, 0.0, 0.00391);
        }
    }
    let c = t.gpu.launches()[0].counters;
    assert_eq!((c.blocks, c.warps, c.barriers), (3, 12, 6));
}

#[test]
fn gemv_reads_every_weight_once_in_whole_sectors() {
    let t = gpu("rtx4090");
    let (rows, cols) = (19i32, 512i32);
    let (w, x) = (bf16s(3, (rows * cols) as usize), data(4, cols as usize));
    let (dw, dx) = (t.stream.clone_htod(&w).unwrap(), t.stream.clone_htod(&x).unwrap());
    let mut dy = t.stream.alloc_zeros::<f32>(rows as usize).unwrap();
    let f = t.kernel("gemv_bf16");
    let mut b = t.stream.launch_builder(&f);
    b.arg(&dw).arg(&dx).arg(&mut dy).arg(&rows).arg(&cols);
    unsafe { b.launch(grid(5, 128)) }.unwrap();
    let y = t.stream.clone_dtoh(&dy).unwrap();
    t.clean();
    for (r, &got) in y.iter().enumerate() {
        let row = &w[r * cols as usize..][..cols as usize];
        let want: f64 = row.iter().zip(&x).map(|(a, &b)| a.to_f64() * f64::from(b)).sum();
        // 512 products of at most 1, each sum rounded to f32: 512 · 2^-24 · the largest partial sum (about 20).
        close(f64::from(got), want, 6e-4, 0.0);
    }
    let c = t.gpu.launches()[0].counters;
    // A row of 512 weights is 32 sectors; x is 64 sectors, shared by the rows.
    assert_eq!(c.distinct_load_sectors, 19 * 32 + 64);
    assert_eq!(c.distinct_store_sectors, 3);
    assert_eq!(c.global_store_requests, 19);
}

#[test]
fn softmax_and_argmax() {
    let t = gpu("a100");
    let n = 1003i32;
    let mut x: Vec<f32> = data(5, 2 * n as usize).iter().map(|v| v * 10.0).collect();
    x[700] = 10.5;
    x[901] = 10.5;
    let dx = t.stream.clone_htod(&x).unwrap();
    let mut dp = t.stream.alloc_zeros::<f32>(x.len()).unwrap();
    let mut dbest = t.stream.alloc_zeros::<i32>(2).unwrap();
    let f = t.kernel("softmax_argmax");
    let mut b = t.stream.launch_builder(&f);
    b.arg(&dx).arg(&mut dp).arg(&mut dbest).arg(&n);
    unsafe { b.launch(grid(2, 256)) }.unwrap();
    let (p, best) = (t.stream.clone_dtoh(&dp).unwrap(), t.stream.clone_dtoh(&dbest).unwrap());
    t.clean();
    assert_eq!(best[0], 700, "the first of equals");
    for r in 0..2 {
        let row = &x[r * n as usize..][..n as usize];
        let most = row.iter().fold(f32::MIN, |a, &b| a.max(b));
        assert_eq!(row[best[r] as usize], most);
        let sum: f64 = row.iter().map(|&v| f64::from(v - most).exp()).sum();
        for (i, &v) in row.iter().enumerate() {
            // expf is within 2 units of the last place, the sum of 1003 terms within 1003 · 2^-24.
            close(f64::from(p[r * n as usize + i]), f64::from(v - most).exp() / sum, 0.0, 1e-4);
        }
    }
}

#[test]
fn split_attention_with_a_ticket() {
    let t = gpu("a100");
    let (len, chunk) = (77i32, 10i32);
    let (q, k, v) = (data(6, 64), data(7, 77 * 64), data(8, 77 * 64));
    let [dq, dk, dv] = [&q, &k, &v].map(|h| t.stream.clone_htod(h).unwrap());
    let blocks = 8u32;
    // Not zeroed: every word that is read must have been written by a block.
    let mut part = unsafe { t.stream.alloc::<f32>(blocks as usize * 66) }.unwrap();
    let mut out = t.stream.alloc_zeros::<f32>(64).unwrap();
    let mut ticket = t.stream.alloc_zeros::<u32>(1).unwrap();
    let f = t.kernel("attention_split");
    for seed in [0, 1, 2, 3] {
        t.gpu.seed(seed);
        let mut b = t.stream.launch_builder(&f);
        b.arg(&dq).arg(&dk).arg(&dv).arg(&mut part).arg(&mut out).arg(&mut ticket).arg(&len).arg(&chunk);
        unsafe { b.launch(grid(blocks, 32)) }.unwrap();
        let got = t.stream.clone_dtoh(&out).unwrap();
        t.clean();
        let dot = |t: usize| (0..64).map(|d| f64::from(q[d]) * f64::from(k[t * 64 + d])).sum::<f64>() * 0.125;
        let weights: Vec<f64> = (0..77).map(|t| dot(t).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (d, &got) in got.iter().enumerate() {
            let want: f64 = (0..77).map(|t| weights[t] / sum * f64::from(v[t * 64 + d])).sum();
            // f32 sums of 77 terms below 1, and __expf.
            close(f64::from(got), want, 1e-5, 0.0);
        }
    }
}

#[test]
fn tensor_core_gemm() {
    let t = gpu("a100");
    let (m, n, k) = (64i32, 128i32, 96i32);
    let (a, b) = (bf16s(9, (m * k) as usize), bf16s(10, (n * k) as usize));
    let (da, db) = (t.stream.clone_htod(&a).unwrap(), t.stream.clone_htod(&b).unwrap());
    let mut dc = t.stream.alloc_zeros::<f32>((m * n) as usize).unwrap();
    let f = t.kernel("gemm_bf16");
    let config = LaunchConfig { grid_dim: (2, 1, 1), block_dim: (128, 1, 1), shared_mem_bytes: 0 };
    let mut l = t.stream.launch_builder(&f);
    l.arg(&da).arg(&db).arg(&mut dc).arg(&m).arg(&n).arg(&k);
    unsafe { l.launch(config) }.unwrap();
    let c = t.stream.clone_dtoh(&dc).unwrap();
    t.clean();
    for i in 0..m as usize {
        for j in 0..n as usize {
            let (row, column) = (&a[i * 96..][..96], &b[j * 96..][..96]);
            let want: f64 = row.iter().zip(column).map(|(x, y)| x.to_f64() * y.to_f64()).sum();
            // Six instructions a sum, each rounded to f32 once.
            close(f64::from(c[i * n as usize + j]), want, 1e-5, 0.0);
        }
    }
    let counters = t.gpu.launches()[0].counters;
    assert_eq!(counters.tensor_multiply_adds, (m * n * k) as u64);
    // A rows are read by two blocks, B rows by one; 16 bytes a lane.
    assert_eq!(counters.async_copy_bytes, (2 * m * k * 2 + n * k * 2) as u64);
    assert_eq!(counters.distinct_load_sectors, ((m + n) * k * 2 / 32) as u64);
}

#[test]
fn histogram_in_dynamic_shared_memory() {
    let t = gpu("h100");
    let x: Vec<u8> = data(11, 5000).iter().map(|v| (v * 127.0) as i8 as u8).collect();
    let dx = t.stream.clone_htod(&x).unwrap();
    let mut counts = t.stream.alloc_zeros::<u32>(256).unwrap();
    let f = t.kernel("histogram");
    let n = 5000i32;
    let mut b = t.stream.launch_builder(&f);
    b.arg(&dx).arg(&mut counts).arg(&n);
    let config = LaunchConfig { grid_dim: (4, 1, 1), block_dim: (96, 1, 1), shared_mem_bytes: 1024 };
    unsafe { b.launch(config) }.unwrap();
    let got = t.stream.clone_dtoh(&counts).unwrap();
    t.clean();
    let mut want = vec![0u32; 256];
    x.iter().for_each(|&v| want[v as usize] += 1);
    assert_eq!(got, want);
    let c = t.gpu.launches()[0].counters;
    assert_eq!((c.shared_atomics, c.global_atomics), (5000, 4 * 256));
}

#[test]
fn divergence_in_a_loop_with_break_continue_and_switch() {
    let t = gpu("a100");
    let x: Vec<u32> = (1..200).collect();
    let dx = t.stream.clone_htod(&x).unwrap();
    let mut steps = t.stream.alloc_zeros::<u32>(x.len()).unwrap();
    let (f, n) = (t.kernel("collatz"), x.len() as i32);
    let mut b = t.stream.launch_builder(&f);
    b.arg(&dx).arg(&mut steps).arg(&n);
    unsafe { b.launch(grid(2, 128)) }.unwrap();
    let got = t.stream.clone_dtoh(&steps).unwrap();
    t.clean();
    let want = |mut v: u32| {
        let mut count = 0;
        while v != 1 && count < 100 {
            match v & 3 {
                0 => (v, count) = (v >> 2, count + 2),
                2 => (v, count) = (v >> 1, count + 1),
                _ => (v, count) = (3 * v + 1, count + 1),
            }
        }
        count
    };
    assert_eq!(got, x.iter().map(|&v| want(v)).collect::<Vec<u32>>());
    let c = t.gpu.launches()[0].counters;
    assert!(c.divergent_branches > 0 && c.lane_efficiency() < 0.9);
}

#[test]
fn a_grid_that_waits_for_itself() {
    let t = gpu("a100");
    let n = 20 * 64;
    let x = data(12, n);
    let dx = t.stream.clone_htod(&x).unwrap();
    let f = t.kernel("grid_barrier");
    for seed in [0, 5] {
        t.gpu.seed(seed);
        let mut tmp = unsafe { t.stream.alloc::<f32>(n) }.unwrap();
        let mut y = t.stream.alloc_zeros::<f32>(n).unwrap();
        let mut count = t.stream.alloc_zeros::<u32>(1).unwrap();
        let len = n as i32;
        let mut b = t.stream.launch_builder(&f);
        b.arg(&dx).arg(&mut tmp).arg(&mut y).arg(&mut count).arg(&len);
        unsafe { b.launch_cooperative(grid(20, 64)) }.unwrap();
        let got = t.stream.clone_dtoh(&y).unwrap();
        t.clean();
        // Doubling is exact, and so the sum is rounded once on both sides.
        let want: Vec<f32> = (0..n).map(|i| 2.0 * x[i] + 2.0 * x[(i + 64) % n]).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn library_functions() {
    let t = gpu("a100");
    let x: Vec<f32> = data(13, 100).iter().map(|v| v * 20.0).collect();
    let dx = t.stream.clone_htod(&x).unwrap();
    let mut dy = t.stream.alloc_zeros::<f32>(800).unwrap();
    let (f, n) = (t.kernel("functions"), 100i32);
    let mut b = t.stream.launch_builder(&f);
    b.arg(&dx).arg(&mut dy).arg(&n);
    unsafe { b.launch(grid(1, 128)) }.unwrap();
    let y = t.stream.clone_dtoh(&dy).unwrap();
    t.clean();
    for (i, &v) in x.iter().enumerate() {
        let (v, a) = (f64::from(v), f64::from(v.abs()));
        let scaled = f64::from(x[i] * 1000.0);
        let want = [
            v.exp(),
            f64::from(x[i].abs() + 1e-3).ln(),
            v.sin(),
            scaled.cos(),
            v.tanh(),
            a.sqrt(),
            v / 3.0,
            a.powf(1.5),
        ];
        for (k, &want) in want.iter().enumerate() {
            // The CUDA math library promises at most 4 units of the last place (powf), 2^-21 relative; near a zero
            // of sine, cosine and logarithm the absolute error counts.
            close(f64::from(y[i * 8 + k]), want, 3e-7, 5e-7);
        }
    }
}

#[test]
fn pairs_of_halves() {
    let t = gpu("a100");
    let halves = |seed| data(seed, 128).into_iter().map(f16::from_f32).collect::<Vec<f16>>();
    let (a, b, c) = (halves(14), halves(15), halves(16));
    let [da, db, dc] = [&a, &b, &c].map(|h| t.stream.clone_htod(h).unwrap());
    let mut dy = t.stream.alloc_zeros::<f16>(128).unwrap();
    let mut dm = t.stream.alloc_zeros::<f32>(64).unwrap();
    let (f, n) = (t.kernel("half_pairs"), 64i32);
    let mut l = t.stream.launch_builder(&f);
    l.arg(&da).arg(&db).arg(&dc).arg(&mut dy).arg(&mut dm).arg(&n);
    unsafe { l.launch(grid(2, 32)) }.unwrap();
    let (y, most) = (t.stream.clone_dtoh(&dy).unwrap(), t.stream.clone_dtoh(&dm).unwrap());
    t.clean();
    for i in 0..128 {
        let exact = a[i].to_f64() * b[i].to_f64() + c[i].to_f64();
        assert_eq!(y[i], f16::from_f64(exact.max(0.0)), "{} {} {}", a[i], b[i], c[i]);
    }
    for i in 0..64 {
        assert_eq!(most[i], y[2 * i].to_f32().max(y[2 * i + 1].to_f32()));
    }
}

#[test]
fn q8_blocks_waste_sectors_and_the_counters_tell() {
    let t = gpu("a100");
    let (rows, blocks) = (4i32, 64i32);
    let count = (rows * blocks) as usize;
    let scales: Vec<f16> = data(17, count).into_iter().map(f16::from_f32).collect();
    let quants: Vec<i8> = data(18, count * 32).iter().map(|v| (v * 127.0) as i8).collect();
    let mut w = Vec::new();
    for b in 0..count {
        w.extend_from_slice(&scales[b].to_le_bytes());
        w.extend(quants[b * 32..][..32].iter().map(|&q| q as u8));
    }
    let xq: Vec<i8> = data(19, blocks as usize * 32).iter().map(|v| (v * 127.0) as i8).collect();
    let words: Vec<i32> =
        xq.chunks(4).map(|c| i32::from_le_bytes([c[0] as u8, c[1] as u8, c[2] as u8, c[3] as u8])).collect();
    let xs = data(20, blocks as usize);
    let dw = t.stream.clone_htod(&w).unwrap();
    let (dq, ds) = (t.stream.clone_htod(&words).unwrap(), t.stream.clone_htod(&xs).unwrap());
    let mut dy = t.stream.alloc_zeros::<f32>(rows as usize).unwrap();
    let f = t.kernel("gemv_q8");
    let mut l = t.stream.launch_builder(&f);
    l.arg(&dw).arg(&dq).arg(&ds).arg(&mut dy).arg(&rows).arg(&blocks);
    unsafe { l.launch(grid(1, 128)) }.unwrap();
    let y = t.stream.clone_dtoh(&dy).unwrap();
    t.clean();
    for r in 0..rows as usize {
        let mut want = 0.0;
        for b in 0..blocks as usize {
            let at = r * blocks as usize + b;
            let dot: i32 = (0..32).map(|i| i32::from(quants[at * 32 + i]) * i32::from(xq[b * 32 + i])).sum();
            want += scales[at].to_f64() * f64::from(xs[b]) * f64::from(dot);
        }
        // 64 terms of at most 32 · 127² in f32.
        close(f64::from(y[r]), want, 64.0 * 516_128.0 * 1.2e-7, 0.0);
    }
    let c = t.gpu.launches()[0].counters;
    assert!(c.load_efficiency() < 0.25, "{}", c.load_efficiency());
}
