//! The names that Stability AI's own code gives the modules of a Stable
//! Diffusion UNet, which kohya's trainer and ComfyUI keep for SDXL.
//!
//! There the blocks are counted through: `input_blocks.4.1` is what diffusers
//! calls `down_blocks.1.attentions.0`, with two layers to a block.

/// The other name of each module, `None` for one that has none: of modules by
/// diffusers' paths.
pub(super) fn names(paths: &[String]) -> Vec<Option<String>> {
    let first = |path: &&String| path.starts_with("down_blocks.0.resnets.") && path.ends_with(".conv1");
    let layers = paths.iter().filter(first).count();
    let attends = |block: usize| paths.iter().any(|path| path.starts_with(&format!("up_blocks.{block}.attentions.")));
    let name = |path: &String| {
        let segments: Vec<&str> = path.split('.').collect();
        name(&segments, layers, &attends)
    };
    if layers == 0 { vec![None; paths.len()] } else { paths.iter().map(name).collect() }
}

fn name(path: &[&str], layers: usize, attends: &impl Fn(usize) -> bool) -> Option<String> {
    let number = |text: &str| text.parse::<usize>().ok();
    Some(match path {
        ["conv_in"] => "input_blocks.0.0".into(),
        ["conv_out"] => "out.2".into(),
        ["time_embedding", "linear_1"] => "time_embed.0".into(),
        ["time_embedding", "linear_2"] => "time_embed.2".into(),
        ["add_embedding", "linear_1"] => "label_emb.0.0".into(),
        ["add_embedding", "linear_2"] => "label_emb.0.2".into(),
        ["mid_block", "attentions", "0", rest @ ..] => format!("middle_block.1.{}", rest.join(".")),
        ["mid_block", "resnets", layer, part] => format!("middle_block.{}.{}", 2 * number(layer)?, resnet(part)?),
        // Each block of `layers` ends with a block that halves or doubles.
        ["down_blocks", block, "downsamplers", "0", "conv"] => {
            format!("input_blocks.{}.0.op", (number(block)? + 1) * (layers + 1))
        }
        ["up_blocks", block, "upsamplers", "0", "conv"] => {
            let block = number(block)?;
            let after = if attends(block) { 2 } else { 1 };
            format!("output_blocks.{}.{after}.conv", block * (layers + 1) + layers)
        }
        [side, block, kind, layer, rest @ ..] => {
            let at = number(block)? * (layers + 1) + number(layer)?;
            let side = match *side {
                "down_blocks" => format!("input_blocks.{}", at + 1),
                "up_blocks" => format!("output_blocks.{at}"),
                _ => return None,
            };
            match (*kind, rest) {
                ("resnets", [part]) => format!("{side}.0.{}", resnet(part)?),
                ("attentions", rest) => format!("{side}.1.{}", rest.join(".")),
                _ => return None,
            }
        }
        _ => return None,
    })
}

/// The parts of a residual block.
fn resnet(part: &str) -> Option<&'static str> {
    Some(match part {
        "conv1" => "in_layers.2",
        "conv2" => "out_layers.3",
        "time_emb_proj" => "emb_layers.1",
        "conv_shortcut" => "skip_connection",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_those_of_sdxl() {
        // From files that kohya's trainer wrote for SDXL.
        let pairs = [
            (
                "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
                Some("input_blocks.4.1.transformer_blocks.1.attn1.to_q"),
            ),
            ("down_blocks.2.attentions.1.proj_in", Some("input_blocks.8.1.proj_in")),
            ("up_blocks.0.attentions.2.proj_out", Some("output_blocks.2.1.proj_out")),
            (
                "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2",
                Some("output_blocks.5.1.transformer_blocks.0.ff.net.2"),
            ),
            ("mid_block.attentions.0.proj_in", Some("middle_block.1.proj_in")),
            ("mid_block.resnets.1.conv1", Some("middle_block.2.in_layers.2")),
            ("down_blocks.0.resnets.0.conv1", Some("input_blocks.1.0.in_layers.2")),
            ("down_blocks.0.resnets.1.conv1", Some("input_blocks.2.0.in_layers.2")),
            ("down_blocks.0.downsamplers.0.conv", Some("input_blocks.3.0.op")),
            ("up_blocks.0.upsamplers.0.conv", Some("output_blocks.2.2.conv")),
            ("encoder.layers.0.self_attn.q_proj", None),
        ];
        let paths: Vec<String> = pairs.iter().map(|(path, _)| path.to_string()).collect();
        let found = names(&paths);
        for ((path, expected), found) in pairs.iter().zip(found) {
            assert_eq!(found.as_deref(), *expected, "{path}");
        }
        assert_eq!(names(&["down_blocks.1.attentions.0.proj_in".to_string()]), [None], "layers unknown");
    }
}
