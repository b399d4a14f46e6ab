//! `train`: the run, its interruptions and refusals on a toy engine, and the command on the real one. One crate, so that all share
//! the toy and link once.

#[path = "train/bad_input.rs"]
mod bad_input;
#[path = "train/cli.rs"]
mod cli;
#[path = "train/exported.rs"]
mod exported;
#[path = "train/gpu.rs"]
mod gpu;
#[path = "train/interrupted.rs"]
mod interrupted;
#[path = "train/pair_world.rs"]
mod pair_world;
#[path = "train/pairs_refused.rs"]
mod pairs_refused;
#[path = "train/refused.rs"]
mod refused;
#[path = "train/run.rs"]
mod run;
#[path = "train/toy.rs"]
mod toy;
#[path = "train/tuned.rs"]
mod tuned;
#[path = "train/world.rs"]
mod world;
