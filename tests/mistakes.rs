//! The twelve commonest mistakes, typed as a user would: each is one line that names the place, the reason and what to type, and typing
//! that helps. The README has them as a table.

#[path = "mistakes/data.rs"]
mod data;
#[path = "mistakes/desk.rs"]
mod desk;
#[path = "mistakes/machine.rs"]
mod machine;
#[path = "train/pair_world.rs"]
mod pair_world;
#[path = "mistakes/training.rs"]
mod training;
#[path = "train/world.rs"]
mod world;

/// Where `world` finds the folder that it works in.
mod toy {
    pub fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }
}
