//! The names that Black Forest Labs' own code gives the modules of Flux, which
//! kohya's trainer and ComfyUI keep.
//!
//! There one layer computes queries, keys and values, and in single blocks the
//! MLP's input too: rows one after the other of what are layers by themselves
//! in diffusers. Its ΔW = s · B · A is theirs with A as it is and B by rows.

use std::collections::BTreeMap;

/// The layers there by their names, each with the modules at `paths`,
/// diffusers' ones, that its rows are.
pub(super) fn layers<'b>(paths: &[&'b str], renamed: &[String]) -> BTreeMap<String, Vec<&'b str>> {
    let mut found: BTreeMap<String, (usize, BTreeMap<usize, &'b str>)> = BTreeMap::new();
    for (path, renamed) in paths.iter().zip(renamed) {
        if let Some((name, at, of)) = piece(renamed) {
            found.entry(name).or_insert((of, BTreeMap::new())).1.insert(at, path);
        }
    }
    let whole = found.into_iter().filter(|(_, (of, pieces))| pieces.len() == *of);
    whole.map(|(name, (_, pieces))| (name, pieces.into_values().collect())).collect()
}

/// The layer that a module is a piece of, which piece, and of how many.
fn piece(path: &str) -> Option<(String, usize, usize)> {
    let whole = |name: &str| Some((name.to_string(), 0, 1));
    let (blocks, rest) = path.split_once('.').unwrap_or((path, ""));
    match blocks {
        "x_embedder" => whole("img_in"),
        "context_embedder" => whole("txt_in"),
        "proj_out" => whole("final_layer.linear"),
        "transformer_blocks" => {
            let (block, rest) = rest.split_once('.')?;
            let (name, at, of) = match rest {
                "attn.to_q" => ("img_attn.qkv", 0, 3),
                "attn.to_k" => ("img_attn.qkv", 1, 3),
                "attn.to_v" => ("img_attn.qkv", 2, 3),
                "attn.to_out.0" => ("img_attn.proj", 0, 1),
                "attn.add_q_proj" => ("txt_attn.qkv", 0, 3),
                "attn.add_k_proj" => ("txt_attn.qkv", 1, 3),
                "attn.add_v_proj" => ("txt_attn.qkv", 2, 3),
                "attn.to_add_out" => ("txt_attn.proj", 0, 1),
                "ff.net.0.proj" => ("img_mlp.0", 0, 1),
                "ff.net.2" => ("img_mlp.2", 0, 1),
                "ff_context.net.0.proj" => ("txt_mlp.0", 0, 1),
                "ff_context.net.2" => ("txt_mlp.2", 0, 1),
                "norm1.linear" => ("img_mod.lin", 0, 1),
                "norm1_context.linear" => ("txt_mod.lin", 0, 1),
                _ => return None,
            };
            Some((format!("double_blocks.{block}.{name}"), at, of))
        }
        "single_transformer_blocks" => {
            let (block, rest) = rest.split_once('.')?;
            let (name, at, of) = match rest {
                "attn.to_q" => ("linear1", 0, 4),
                "attn.to_k" => ("linear1", 1, 4),
                "attn.to_v" => ("linear1", 2, 4),
                "proj_mlp" => ("linear1", 3, 4),
                "proj_out" => ("linear2", 0, 1),
                "norm.linear" => ("modulation.lin", 0, 1),
                _ => return None,
            };
            Some((format!("single_blocks.{block}.{name}"), at, of))
        }
        "time_text_embed" => match rest {
            "timestep_embedder.linear_1" => whole("time_in.in_layer"),
            "timestep_embedder.linear_2" => whole("time_in.out_layer"),
            "text_embedder.linear_1" => whole("vector_in.in_layer"),
            "text_embedder.linear_2" => whole("vector_in.out_layer"),
            "guidance_embedder.linear_1" => whole("guidance_in.in_layer"),
            "guidance_embedder.linear_2" => whole("guidance_in.out_layer"),
            _ => None,
        },
        _ => None,
    }
}
