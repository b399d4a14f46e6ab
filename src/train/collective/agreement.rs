//! Whether all ranks are in the same run: settings, data and weights.

use std::collections::BTreeMap;

use super::Team;
use crate::error::{Error, Result};

/// Refuses ranks whose settings, data or model are not those of rank 0. `identity` is what makes two runs the same.
///
/// # Errors
/// The first rank that differs, and in what.
pub fn same_run(team: &Team, identity: &BTreeMap<String, String>) -> Result<()> {
    if !team.is_shared() {
        return Ok(());
    }
    let own = serde_json::to_vec(identity)
        .map_err(|e| Error::refused(format!("the settings cannot be sent: {e}")).remedy("report this as a defect"))?;
    let mut all = Vec::new();
    for (rank, one) in team.exchange(&own)?.iter().enumerate() {
        let one: BTreeMap<String, String> = serde_json::from_slice(one)
            .map_err(|e| Error::refused(format!("rank {rank}: no settings: {e}")).remedy("report this as a defect"))?;
        all.push(one);
    }
    let Some((first, others)) = all.split_first() else { return Ok(()) };
    for (rank, other) in others.iter().enumerate() {
        let value = |map: &BTreeMap<String, String>, key: &str| map.get(key).cloned().unwrap_or_else(|| "unset".into());
        let differs = first.keys().chain(other.keys()).find(|key| first.get(*key) != other.get(*key));
        if let Some(key) = differs {
            let cause =
                format!("rank {}: {key} is {}, that of rank 0 {}", rank + 1, value(other, key), value(first, key));
            return Err(Error::refused(cause).remedy("give every rank the same settings, data and model"));
        }
    }
    Ok(())
}

/// Refuses ranks whose weights are not those of rank 0: from there on they would train different models.
///
/// # Errors
/// The first rank that differs.
pub fn same_weights(team: &Team, step: u64, weights: &[f32]) -> Result<()> {
    if !team.is_shared() {
        return Ok(());
    }
    let digest = crc32c::crc32c(bytemuck::cast_slice(weights)).to_le_bytes();
    let all = team.exchange(&digest)?;
    match all.iter().position(|one| *one != all[0]) {
        None => Ok(()),
        Some(rank) => {
            let cause = format!("rank {rank}: its weights after step {step} are not those of rank 0");
            Err(Error::refused(cause).remedy("check the memory of its machine, then go on from the last checkpoint"))
        }
    }
}
