//! `trainable_token_indices`: the tables of which an adapter trains rows.

use super::tied;
use crate::base::{Base, Site, Weight, WeightRole};
use crate::error::{Error, Result};
use crate::lora::{LoraConfig, Switches, TokenIndices, TokenRows};
use crate::names;
use std::sync::Arc;

/// Trained rows of one table.
#[derive(Debug)]
pub(super) struct Tokens {
    pub(super) path: String,
    pub(super) site: Arc<Site>,
    pub(super) rows: Vec<i64>,
    pub(super) value: Arc<TokenRows>,
}

/// The tables of which rows are trained.
pub(super) fn tokens<M>(base: &Base<M>, config: &LoraConfig, switches: &Arc<Switches>) -> Result<Vec<Tokens>> {
    let tables: Vec<_> = base.weights().layers().filter(|(_, weight)| weight.role == WeightRole::Embedding).collect();
    let none = |entry: &str| Error::NoTarget {
        target: entry.into(),
        near: names::near(entry, tables.iter().map(|(path, _)| *path)),
    };
    let wanted: Vec<(String, Vec<i64>)> = match &config.trainable_token_indices {
        None => return Ok(Vec::new()),
        Some(TokenIndices::Modules(modules)) => modules.clone().into_iter().collect(),
        // The input embedding: the one that transformers calls so, or the only one.
        Some(TokenIndices::Input(rows)) => match tables.as_slice() {
            [(only, _)] => vec![(only.to_string(), rows.clone())],
            _ => vec![("embed_tokens".into(), rows.clone())],
        },
    };
    let mut tokens: Vec<Tokens> = Vec::new();
    let mut outputs = Vec::new();
    for (entry, rows) in wanted {
        let found: Vec<_> = tables.iter().filter(|(path, _)| names::suffix_matches(path, &entry)).collect();
        if found.is_empty()
            && let Some(table) = tied_table(base, &entry)
        {
            outputs.push((entry, table, rows));
            continue;
        }
        if found.is_empty() {
            return Err(none(&entry));
        }
        for (path, weight) in found {
            let site = weight.site_or_attach()?;
            if tokens.iter().any(|other| Arc::ptr_eq(&other.site, &site)) {
                return Err(Error::config("trainable_token_indices", "each table once", path));
            }
            let table = site.frozen();
            let value = TokenRows::new(path, table.as_ref(), &rows, config.dtype, Arc::clone(switches))?;
            tokens.push(Tokens { path: path.to_string(), site, rows: rows.clone(), value: Arc::new(value) });
        }
    }
    // An output layer that is tied to a table follows it.
    for (entry, table, rows) in outputs {
        let same = |tokens: &&Tokens| tokens.path == table && tokens.rows == rows;
        if tokens.iter().find(same).is_none() {
            let expected = format!("the same rows as of {table}, to which it is tied");
            return Err(Error::config("trainable_token_indices", expected, format!("{rows:?} of {entry}")));
        }
    }
    Ok(tokens)
}

/// The table that the weight of an output layer is tied to.
fn tied_table<'a, M>(base: &'a Base<M>, entry: &str) -> Option<&'a str> {
    let named = |weight: &&Weight| weight.module_path().is_some_and(|path| names::suffix_matches(path, entry));
    let weight = base.weights().iter().filter(named).find(|weight| weight.tied.is_some())?;
    tied::source(base.weights(), weight)?.module_path()
}
