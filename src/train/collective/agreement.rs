//! What ranks tell each other about a run: whether all are in the same one, when to stop, what an evaluation found.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Team;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::train::{Arena, Arenas, EvalPart};

fn defect(e: &serde_json::Error) -> Error {
    Error::refused(format!("a message between ranks: {e}")).remedy("report this as a defect")
}

/// What every rank says, in their order.
fn said<T: Serialize + DeserializeOwned>(team: &Team, own: &T) -> Result<Vec<T>> {
    let own = serde_json::to_vec(own).map_err(|e| defect(&e))?;
    let all = team.exchange(&own)?;
    all.iter().map(|one| serde_json::from_slice(one).map_err(|e| defect(&e))).collect()
}

/// What rank 0 says.
///
/// # Errors
/// The failure of a rank.
pub fn told<T: Serialize + DeserializeOwned>(team: &Team, own: T) -> Result<T> {
    if !team.is_shared() {
        return Ok(own);
    }
    let own = serde_json::to_vec(&own).map_err(|e| defect(&e))?;
    serde_json::from_slice(&team.tell(&own)?).map_err(|e| defect(&e))
}

/// The signal that asked a rank to stop, the same for all: the lowest rank's.
///
/// # Errors
/// The failure of a rank.
pub fn stop(team: &Team, own: Option<i32>) -> Result<Option<i32>> {
    if !team.is_shared() {
        return Ok(own);
    }
    // No signal is nothing said.
    let own = own.map_or_else(Vec::new, |signal| signal.to_ne_bytes().to_vec());
    let first = team.joined(&own, &|all| all.into_iter().find(|one| !one.is_empty()).unwrap_or_default())?;
    Ok(first.try_into().ok().map(i32::from_ne_bytes))
}

/// The lists of all ranks, joined.
///
/// # Errors
/// The failure of a rank.
pub fn joined(team: &Team, own: Vec<String>) -> Result<Vec<String>> {
    if !team.is_shared() {
        return Ok(own);
    }
    Ok(said(team, &own)?.into_iter().flatten().collect())
}

/// Weights and moments of all ranks become those of rank 0.
///
/// # Errors
/// The failure of a rank.
pub fn spread(team: &Team, engine: &mut dyn Arenas) -> Result<()> {
    let mut data = Vec::new();
    for which in [Arena::Weights, Arena::Moment1, Arena::Moment2] {
        engine.read_arena(which, &mut data)?;
        let all = Device::Cpu.tensor(&data);
        team.broadcast(&all)?;
        if team.rank() > 0 {
            engine.write_arena(which, &all.to_vec::<f32>())?;
        }
    }
    Ok(())
}

/// The parts of a loss, by which a rank without texts knows those of the others.
const PARTS: [&str; 6] = ["encoder", "decoder", "bow", "contrastive", "distill", "ranking"];

/// Adds the sums of a batch to those of others.
pub fn add(sums: &mut Vec<EvalPart>, part: EvalPart) {
    match sums.iter_mut().find(|sum| sum.name == part.name) {
        Some(sum) => {
            sum.loss_sum += part.loss_sum;
            sum.correct = sum.correct.zip(part.correct).map(|(a, b)| a + b);
            sum.labels += part.labels;
        }
        None => sums.push(part),
    }
}

/// The sums of an evaluation over all ranks, in their order; none when one of them has broken it off.
///
/// # Errors
/// The failure of a rank.
pub fn evaluation(team: &Team, own: Option<Vec<EvalPart>>) -> Result<Option<Vec<EvalPart>>> {
    if !team.is_shared() {
        return Ok(own);
    }
    // Numbers as bits: text would not give back every one of them.
    type Numbers = (String, u64, Option<u64>, u64, u64);
    let numbers =
        |p: EvalPart| -> Numbers { (p.name.into(), p.loss_sum.to_bits(), p.correct, p.labels, p.weight.to_bits()) };
    let own = own.map(|parts| parts.into_iter().map(numbers).collect::<Vec<_>>());
    let mut sums = Vec::new();
    for one in said(team, &own)? {
        let Some(parts) = one else { return Ok(None) };
        for (name, loss_sum, correct, labels, weight) in parts {
            let Some(&name) = PARTS.iter().find(|known| **known == name) else { continue };
            let (loss_sum, weight) = (f64::from_bits(loss_sum), f64::from_bits(weight));
            add(&mut sums, EvalPart { name, loss_sum, correct, labels, weight });
        }
    }
    Ok(Some(sums))
}

/// Refuses ranks whose settings, data or model are not those of rank 0. `identity` is what makes two runs the same.
///
/// # Errors
/// The first rank that differs, and in what.
pub fn same_run(team: &Team, identity: &BTreeMap<String, String>) -> Result<()> {
    if !team.is_shared() {
        return Ok(());
    }
    let all = said(team, identity)?;
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
