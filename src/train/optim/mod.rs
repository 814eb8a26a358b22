//! Optimizers: one frame with groups, names and states, and one update rule for
//! each.

mod adafactor;
mod adamw;
mod adamw8bit;
mod blockwise;
mod builder;
mod grouped;
mod kernel;
mod lion;
mod rule;
mod sgd;

pub use adafactor::{Adafactor, AdafactorRule};
pub use adamw::{AdamW, AdamWBuilder, AdamWRule};
pub use adamw8bit::{AdamW8bit, AdamW8bitRule};
pub use builder::OptimizerBuilder;
pub use grouped::GroupedOptimizer;
pub use lion::{Lion, LionRule};
pub use rule::{ParameterGroup, Update, UpdateRule};
pub use sgd::{Sgd, SgdRule};
