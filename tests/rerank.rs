//! Reranking: scores, the command, its interruptions and refusals.

#[path = "rerank/command.rs"]
mod command;
#[path = "rerank/interrupted.rs"]
mod interrupted;
#[path = "rerank/refused.rs"]
mod refused;
#[path = "rerank/scores.rs"]
mod scores;
#[path = "rerank/world.rs"]
mod world;
