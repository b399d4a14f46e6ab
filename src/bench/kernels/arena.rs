//! What works on the flat arena of all parameters: the gradient's norm, AdamW.

use super::{Bench, Work};
use crate::device::DType;
use crate::error::Result;
use crate::ops::optimizer::{self, AdamW, Update};

/// Times all of them.
pub(super) fn cases(bench: &Bench<'_>) -> Result<()> {
    let setup = bench.setup;
    // As many as BERT-base and the enhanced decoder have.
    let n = if bench.tiny() { 10_000 } else { 116_600_000 };
    bench.case("squared norm of the gradient", Work { flops: 0, bytes: 4 * n }, || {
        let (g, norm) = (bench.wide(n, 1e-3), setup.device.zeros(DType::F64, 1));
        Box::new(move || optimizer::squared_norm(setup.device, &g, &norm))
    })?;
    // Weight, gradient and two moments in, three of them and the rounded weight out.
    let (rounded, copied) = if setup.storage == DType::BF16 { (2, true) } else { (0, false) };
    bench.case("AdamW", Work { flops: 0, bytes: (28 + rounded) * n }, || {
        let [w, g, m] = [0.02, 1e-3, 1e-4].map(|scale| bench.wide(n, scale));
        let v = setup.device.zeros(DType::F32, n);
        let (copy, norm) = (copied.then(|| bench.room(n)), setup.device.zeros(DType::F64, 1));
        let (adamw, lr, t) = (AdamW::default(), 1e-5, 10);
        let schedule = setup.device.tensor(&adamw.schedule(lr, t));
        optimizer::squared_norm(setup.device, &g, &norm);
        Box::new(move || {
            let update = Update {
                adamw,
                lr,
                t,
                schedule: Some(&schedule),
                w: &w,
                copy: copy.as_ref(),
                g: &g,
                m: &m,
                v: &v,
                decayed: n,
                squared_norm: &norm,
            };
            optimizer::update(setup.device, &update);
        })
    })
}
