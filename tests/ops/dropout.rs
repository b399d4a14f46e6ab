//! Dropout as the ops apply it: how much is kept, which element is which, and that only names decide.

use retromae_engine::device::{DType, Matrix, Tensor};
use retromae_engine::ops::attention;
use retromae_engine::ops::dropout::apply;
use retromae_engine::ops::layernorm::{Forward, Shape, forward};
use retromae_engine::ops::{RowNames, SiteDropout};
use retromae_engine::rng::Dropout;

use super::common::{CPU, Lab, Names, borders, dropout, equal_bits};

const LAB: Lab = Lab { dtype: DType::F32, start: 0.0 };

/// Ones through the dropout of LayerNorm: `[rows, width]` zeros and scales.
fn masks(rows: usize, width: usize, site: SiteDropout, names: RowNames<'_>) -> Vec<f64> {
    let (z, y, mean, rstd) =
        (LAB.in_place(&vec![1.0; rows * width]), LAB.set(rows * width), LAB.set(rows), LAB.set(rows));
    let one = LAB.tensor(&vec![1.0; width]);
    forward(
        CPU,
        &Forward {
            shape: Shape { rows: rows.into(), width, eps: 1e-12 },
            x: &z.tensor,
            residual: None,
            dropout: Some((site, names)),
            gamma: &one,
            beta: &one,
            y: &y.tensor,
            mean: &mean.tensor,
            rstd: &rstd.tensor,
        },
    );
    z.take()
}

/// The op by itself drops what LayerNorm's part drops, and off it changes nothing.
#[test]
fn rows_alone_have_the_same_masks() {
    let (names, site) = (Names::all(&[7, 5]), dropout(0.3, 3));
    let alone = |site| {
        let x = LAB.in_place(&vec![1.0; 12 * 40]);
        apply(CPU, site, names.rows(), (12.into(), 40), &x.tensor);
        x.take()
    };
    assert!(equal_bits(&alone(site), &masks(12, 40, site, names.rows())));
    assert!(alone(dropout(0.0, 3)).iter().all(|&x| x == 1.0));
}

#[test]
fn the_fraction_kept_and_its_scale() {
    let names = Names::all(&[100, 60, 96]);
    for p in [0.01f32, 0.1, 0.5, 0.9] {
        let z = masks(256, 1000, dropout(p, 3), names.rows());
        let kept = z.iter().filter(|&&z| z != 0.0).count() as f64 / z.len() as f64;
        let q = 1.0 - f64::from(p);
        // Five standard deviations of the mean of that many draws, and half a step of the 16-bit threshold.
        let tolerance = 5.0 * (q * (1.0 - q) / z.len() as f64).sqrt() + 0.5 / 65536.0;
        assert!((kept - q).abs() <= tolerance, "p = {p}: {kept} kept");
        let scale = z.iter().fold(0.0f64, |a, &b| a.max(b));
        assert!(z.iter().all(|&z| z == 0.0 || z == scale));
        assert!((scale * q - 1.0).abs() < 1e-3, "what is kept makes up for the rest: {scale} at p = {p}");
    }
}

/// The masks that the GPU kernels draw: element e of a row is half-word e % 8 of group e / 8.
#[test]
fn elements_are_named_as_documented() {
    let (site, names) = (dropout(0.4, 3), Names::of(&[vec![], vec![0, 511]]));
    let z = masks(2, 133, site, names.rows());
    for (row, position) in [0u32, 511].into_iter().enumerate() {
        for e in 0..133 {
            let bits = site.mask.bits(3, (1 << 40) + 3, position, (e / 8) as u32)[e % 8];
            assert_eq!(z[row * 133 + e] != 0.0, u32::from(bits) >= site.mask.threshold, "row {row}, element {e}");
        }
    }
}

/// Probabilities are named by `head << 16 | key`. Equal scores and values that are unit vectors show every kept probability.
#[test]
fn probabilities_are_named_as_documented() {
    let (heads, d, n) = (3, 16, 11);
    let (site, names, c) = (dropout(0.4, 8), Names::all(&[n]), 48);
    let unit = |key: usize, e: usize| if e % d == key { 1.0 } else { 0.0 };
    let v = LAB.tensor(&(0..n * c).map(|i| unit(i / c, i % c)).collect::<Vec<_>>());
    let (zero, out, lse) = (Tensor::zeros(DType::F32, n * c), LAB.set(n * c), LAB.set(n * heads));
    let cu = Tensor::from_slice(&borders(&[n]));
    attention::forward(
        CPU,
        &attention::Forward {
            shape: attention::Shape { sequences: 1, heads, head_size: d, cu_rows: &cu, cu_seqlens: &cu, work: None },
            q: Matrix::new(&zero, c),
            k: Matrix::new(&zero, c),
            v: Matrix::new(&v, c),
            names: names.rows(),
            dropout: site,
            out: &out.tensor,
            lse: &lse.tensor,
        },
    );
    let out = out.take();
    for (row, head, key) in (0..n).flat_map(|r| (0..heads).flat_map(move |h| (0..n).map(move |k| (r, h, k)))) {
        let group = ((head << 16 | key) / 8) as u32;
        let bits = site.mask.bits(8, 1 << 40, row as u32, group)[key % 8];
        let kept = u32::from(bits) >= site.mask.threshold;
        assert_eq!(out[row * c + head * d + key] != 0.0, kept, "row {row}, head {head}, key {key}");
    }
}

/// Pruning: the rows that are left draw what they drew among all.
#[test]
fn pruned_rows_have_the_masks_of_unpruned_ones() {
    let (all, some) = (Names::all(&[5, 9, 4]), Names::of(&[vec![0, 4], vec![], vec![1]]));
    let full = masks(18, 33, dropout(0.3, 2), all.rows());
    let pruned = masks(3, 33, dropout(0.3, 2), some.rows());
    for (row, of) in [0, 4, 15].into_iter().enumerate() {
        assert!(equal_bits(&pruned[row * 33..(row + 1) * 33], &full[of * 33..(of + 1) * 33]));
    }
}

/// Every part of a name matters: seed, step, site, sample, position.
#[test]
fn other_names_draw_other_masks() {
    let names = |sample: u64, position: u32| {
        (Tensor::from_slice(&[sample]), Tensor::from_slice(&[0u32]), Tensor::from_slice(&[position]))
    };
    let draw = |mask: Dropout, site: u32, sample: u64, position: u32| {
        let (samples, sequence, position) = names(sample, position);
        let rows = RowNames { samples: &samples, sequence: &sequence, position: &position };
        masks(1, 256, SiteDropout { mask, site }, rows)
    };
    let first = draw(Dropout::new(1, 1, 0.5), 1, 1, 1);
    assert_eq!(first, draw(Dropout::new(1, 1, 0.5), 1, 1, 1));
    for other in [
        draw(Dropout::new(2, 1, 0.5), 1, 1, 1),
        draw(Dropout::new(1, 2, 0.5), 1, 1, 1),
        draw(Dropout::new(1, 1, 0.5), 2, 1, 1),
        draw(Dropout::new(1, 1, 0.5), 1, 2, 1),
        // The upper word of the sample's number.
        draw(Dropout::new(1, 1, 0.5), 1, 1 + (1 << 32), 1),
        draw(Dropout::new(1, 1, 0.5), 1, 1, 2),
    ] {
        let equal = first.iter().zip(&other).filter(|(a, b)| a == b).count();
        // 128 of 256 on average, standard deviation 8.
        assert!((80..176).contains(&equal), "{equal} of 256 elements are equal");
    }
}
