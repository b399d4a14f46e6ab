//! What must hold of the whole graph on any model and batch: gradients are those of the loss, pruning and batch splits change
//! nothing, degenerate batches work, bits repeat, texts do not see each other.

#[path = "graph/common.rs"]
mod common;
#[path = "graph/degenerate.rs"]
mod degenerate;
#[path = "graph/gpu.rs"]
mod gpu;
#[path = "graph/gradients.rs"]
mod gradients;
#[path = "graph/neighbours.rs"]
mod neighbours;
#[path = "graph/pruning.rs"]
mod pruning;
#[path = "graph/splits.rs"]
mod splits;
