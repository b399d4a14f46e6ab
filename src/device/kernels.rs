//! The kernels that build.rs compiled: embedded PTX, and one typed launch stub for each entry point of `kernels/*.cu`.
//!
//! The `.cu` signature is the single source. A stub is a struct with the kernel's parameters as named, typed fields; wrong names, types
//! or numbers do not compile.
#![allow(non_snake_case)] // fields are named as in the kernels, where sizes are capitals (the glossary: B S T C H D V)

use super::launch::{ConstPtr, EmulatedKernel, Kernel, Launcher, Module, MutPtr, Shape};
use crate::error::Result;
use std::ffi::c_void;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
