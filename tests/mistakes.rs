//! The twelve commonest mistakes, typed as a user would: each is one line that names the place, the reason and what to type, and typing
//! that helps. The README has them as a table.

#[path = "mistakes/data.rs"]
mod data;
#[path = "mistakes/desk.rs"]
mod desk;
#[path = "mistakes/machine.rs"]
mod machine;
#[path = "train/pair_files.rs"]
mod pair_files;
#[path = "train/texts.rs"]
mod texts;
#[path = "mistakes/training.rs"]
mod training;
