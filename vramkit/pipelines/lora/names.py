"""The names that LoRA files give to the layers of a model.

A name is a prefix, a layer and a part, as in ``transformer.blocks.0.attn1.to_q.lora_A.weight``. Layers are spelled as in
diffusers and PEFT, as in the model's original code, as ComfyUI repackages it, or as any of these with underscores for dots
(kohya, musubi). A spelling that is not known stays unknown: a guess would load weights into the wrong layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vramkit.errors import CheckpointError
from vramkit.pipelines.loading.rules import Rules, rewritten

__all__ = ["Names", "component_of", "parse", "refuse_other_kinds"]

_COMPONENTS = {  # beginning of a name -> the component that it belongs to; all others belong to the transformer
    re.compile(r"(transformer_2|low_noise_model|dit2)\.|lora_transformer_2[._]"): "transformer_2",
    re.compile(r"text_encoder_2\.|lora_te2[._]|text_encoders\.clip_l\."): "text_encoder_2",
    re.compile(r"text_encoder\.|lora_te1?[._]|text_encoders\.(llama|umt5xxl|t5xxl)\."): "text_encoder",
}
_PREFIX = re.compile(
    r"(base_model\.model|pipe|dit|transformer(_1)?|high_noise_model|diffusion_model|model|unet|module|net|generator(_ema)?)\."
    r"|text_model[._]|lora_(unet|transformer|dit)[._]+|lycoris[._]+"
)
_WRAPPERS = re.compile(r"_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]")  # anywhere in a name
_NAMED = r"(\.[^.]+)?"  # an adapter, as in lora_A.default.weight
_PARTS = {
    "down": re.compile(
        rf"\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down){_NAMED}\.weight$|(?<=_lora)\.down\.weight$"
        r"|\.lora_A(\.default(_\d+)?)?$"
    ),
    "up": re.compile(
        rf"\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up){_NAMED}\.weight$|(?<=_lora)\.up\.weight$"
        r"|\.lora_B(\.default(_\d+)?)?$"
    ),
    "bias": re.compile(rf"\.(lora_B|lora_up|lora\.up){_NAMED}\.bias$"),
    "alpha": re.compile(r"\.alpha$"),
    "diff": re.compile(r"\.(diff|w_norm)$"),
    "diff_b": re.compile(r"\.(diff_b|b_norm)$"),
    "diff_m": re.compile(r"(^|\.)diff_m$"),
    "value": re.compile(rf"(\.base_layer|\.modules_to_save{_NAMED})?\.weight$"),
    "value_b": re.compile(rf"(\.base_layer|\.modules_to_save{_NAMED})?\.bias$"),
}
_OTHER_KINDS = {
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "AdaLoRA": re.compile(r"\.(lora_E|ranknum)\b"),
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"),
    "Tucker LoCon": re.compile(r"\.lora_mid\b"),
    "OFT": re.compile(r"\.oft_"),
    "BOFT": re.compile(r"\.boft_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "IA3": re.compile(r"\.(on_input|ia3_\w+)$"),
    "VeRA": re.compile(r"\.p?vera_"),
    "HRA": re.compile(r"\.hra_"),
    "FourierFT": re.compile(r"\.fourierft_"),
    "VB-LoRA": re.compile(r"\.vblora_"),
    "RandLoRA": re.compile(r"\.randlora_"),
    "Bone or MiSS": re.compile(r"\.(bone|miss)_"),
    "SHiRA": re.compile(r"\.shira_"),
    "embedding": re.compile(r"\.lora_embedding_"),
    "replacing": re.compile(r"\.(set_weight|reshape_weight)$"),
}
_TABLES = ("modulation", "scale_shift_table")  # what diff_m stands for, original and ours

_HUNYUAN: Rules = (  # (pattern of our names, original spelling)
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.", "txt_in.individual_token_refiner.blocks."),
    (r"^(double_blocks\.\d+)\.attn\.to_[qkv]$", r"\1.img_attn_qkv"),
    (r"^(double_blocks\.\d+)\.attn\.add_[qkv]_proj$", r"\1.txt_attn_qkv"),
    (r"^(double_blocks\.\d+)\.attn\.to_out\.0$", r"\1.img_attn_proj"),
    (r"^(double_blocks\.\d+)\.attn\.to_add_out$", r"\1.txt_attn_proj"),
    (r"^(double_blocks\.\d+)\.attn\.norm_([qk])$", r"\1.img_attn_\2_norm"),
    (r"^(double_blocks\.\d+)\.attn\.norm_added_([qk])$", r"\1.txt_attn_\2_norm"),
    (r"^(double_blocks\.\d+)\.norm1\.linear$", r"\1.img_mod.linear"),
    (r"^(double_blocks\.\d+)\.norm1_context\.linear$", r"\1.txt_mod.linear"),
    (r"^(double_blocks\.\d+)\.ff\.net\.0\.proj$", r"\1.img_mlp.fc1"),
    (r"^(double_blocks\.\d+)\.ff\.net\.2$", r"\1.img_mlp.fc2"),
    (r"^(double_blocks\.\d+)\.ff_context\.net\.0\.proj$", r"\1.txt_mlp.fc1"),
    (r"^(double_blocks\.\d+)\.ff_context\.net\.2$", r"\1.txt_mlp.fc2"),
    (r"^(single_blocks\.\d+)\.(attn\.to_[qkv]|proj_mlp)$", r"\1.linear1"),
    (r"^(single_blocks\.\d+)\.attn\.norm_([qk])$", r"\1.\2_norm"),
    (r"^(single_blocks\.\d+)\.proj_out$", r"\1.linear2"),
    (r"^(single_blocks\.\d+)\.norm\.linear$", r"\1.modulation.linear"),
    (r"^(txt_in\..*)\.attn\.to_[qkv]$", r"\1.self_attn_qkv"),
    (r"^(txt_in\..*)\.attn\.to_out\.0$", r"\1.self_attn_proj"),
    (r"^(txt_in\..*)\.ff\.net\.0\.proj$", r"\1.mlp.fc1"),
    (r"^(txt_in\..*)\.ff\.net\.2$", r"\1.mlp.fc2"),
    (r"^(txt_in\..*)\.norm_out\.linear$", r"\1.adaLN_modulation.1"),
    (r"^context_embedder\.proj_in$", "txt_in.input_embedder"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1$", "txt_in.t_embedder.mlp.0"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2$", "txt_in.t_embedder.mlp.2"),
    (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
    (r"^time_text_embed\.timestep_embedder\.linear_1$", "time_in.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2$", "time_in.mlp.2"),
    (r"^time_text_embed\.guidance_embedder\.linear_1$", "guidance_in.mlp.0"),
    (r"^time_text_embed\.guidance_embedder\.linear_2$", "guidance_in.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1$", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2$", "vector_in.out_layer"),
    (r"^x_embedder\.proj$", "img_in.proj"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1"),
    (r"^proj_out$", "final_layer.linear"),
)
_HUNYUAN_COMFY: Rules = (  # on top of the original spelling
    (r"_attn_qkv$", "_attn.qkv"),
    (r"_attn_proj$", "_attn.proj"),
    (r"_attn_q_norm$", "_attn.norm.query_norm"),
    (r"_attn_k_norm$", "_attn.norm.key_norm"),
    (r"\.q_norm$", ".norm.query_norm"),
    (r"\.k_norm$", ".norm.key_norm"),
    (r"mlp\.fc1$", "mlp.0"),
    (r"mlp\.fc2$", "mlp.2"),
    (r"(_mod|\.modulation)\.linear$", r"\1.lin"),
    (r"^(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.0$", r"\1.in_layer"),
    (r"^(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.2$", r"\1.out_layer"),
    (r"^txt_in\.c_embedder\.linear_1$", "txt_in.c_embedder.in_layer"),
    (r"^txt_in\.c_embedder\.linear_2$", "txt_in.c_embedder.out_layer"),
)
_WAN: Rules = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.add_([kv])_proj$", r".\1_img"),
    (r"\.norm_added_k$", ".norm_k_img"),
    (r"\.to_out\.0$", ".o"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"^(blocks\.\d+)\.norm2$", r"\1.norm3"),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2$", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    (r"^proj_out$", "head.head"),
)
_LTX: Rules = (
    (r"^proj_in$", "patchify_proj"),
    (r"^time_embed\.", "adaln_single."),
    (r"\.norm_q$", ".q_norm"),
    (r"\.norm_k$", ".k_norm"),
)
_ORIGINAL: dict[str, tuple[Rules, ...]] = {  # class of the model -> spellings, each on top of the one before
    "WanTransformer3DModel": (_WAN,),
    "HunyuanVideoTransformer3DModel": (_HUNYUAN, _HUNYUAN_COMFY),
    "LTXVideoTransformer3DModel": (_LTX,),
}
_PROCESSORS: Rules = (  # of diffusers before it used PEFT, whatever the model
    (r"\.to_([qkv])$", r".processor.to_\1_lora"),
    (r"\.to_out\.0$", ".processor.to_out_lora"),
    (r"\.add_([qkv])_proj$", r".processor.add_\1_proj_lora"),
    (r"\.self_attn\.([qkv])_proj$", r".self_attn.to_\1_lora"),
    (r"\.self_attn\.out_proj$", ".self_attn.to_out_lora"),
)
_ROWS = re.compile(r"(to_q|add_q_proj)|(to_k|add_k_proj)|(to_v|add_v_proj)|(proj_mlp)")  # the order in a joined layer
_SHIFT_FIRST = (
    "final_layer.adaLN_modulation.1"  # makes shift and scale, where the layer of diffusers makes scale and shift
)


class Names:
    """Finds the layers of a model, and its tables, by every way to write them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}  # with weights, under the names that they have without adapters
        self.tables: dict[str, nn.Parameter] = {}  # parameters that are no weight or bias of a layer
        for name, module in model.named_modules():
            if ".base_layer" in name or ".lora_" in name:
                continue
            base = getattr(module, "base_layer", module)
            for key, parameter in base.named_parameters(recurse=False):
                if key == "weight":
                    self.modules[name] = base
                elif key != "bias":
                    self.tables[f"{name}.{key}" if name else key] = parameter
        self._spelled: dict[str, tuple[str, ...]] = {}
        self._swapped: set[str] = set()
        for spellings in self._spellings(type(model).__name__):
            self._add(spellings)

    def find(self, layer: str, part: str) -> tuple[str, tuple[str, ...]]:
        """Return the spelling without prefixes, and our names: several where a layer holds the rows of several of ours."""
        layer = _WRAPPERS.sub("", layer)
        while True:
            for spelling in _table_spellings(layer) if part == "diff_m" else (layer,):
                if spelling in self._spelled:
                    return spelling, self._spelled[spelling]
            prefix = _PREFIX.match(layer)
            if prefix is None:
                return layer, ()
            layer = layer[prefix.end() :]

    def rows(self, spelling: str, names: Iterable[str], tensor: Tensor) -> list[Tensor]:
        """Cut what a file has for `spelling` into the rows of our layers.

        Raises:
            ValueError: another number of rows.
        """
        names = list(names)
        if len(names) > 1:
            sizes = [int(self.modules[name].out_features) for name in names]  # type: ignore[arg-type]
            if not tensor.ndim or tensor.shape[0] != sum(sizes):
                raise ValueError(f"is {list(tensor.shape)}, expected {sum(sizes)} rows")
            return [piece.clone() for piece in torch.split(tensor, sizes)]
        if spelling in self._swapped and tensor.ndim and tensor.shape[0] % 2 == 0:
            return [torch.cat(tensor.chunk(2)[::-1])]
        return [tensor]

    def _spellings(self, model_class: str) -> Iterable[Mapping[str, str]]:
        """Our name -> its spelling, for each way to write the model."""
        spellings = {name: name for name in (*self.modules, *self.tables)}
        yield spellings
        yield {name: rewritten(name, _PROCESSORS) for name in spellings}
        for rules in _ORIGINAL.get(model_class, ()):
            spellings = {name: rewritten(spelling, rules) for name, spelling in spellings.items()}
            yield spellings

    def _add(self, spellings: Mapping[str, str]) -> None:
        names_of: dict[str, list[str]] = defaultdict(list)
        for name, spelling in spellings.items():
            names_of[spelling].append(name)
        for spelling, names in names_of.items():
            for written in (spelling, spelling.replace(".", "_")):
                self._spelled.setdefault(written, tuple(sorted(names, key=_row_order)))
                if spelling == _SHIFT_FIRST:
                    self._swapped.add(written)


def parse(key: str) -> tuple[str, str | None]:
    """Split a name into the layer, with its prefixes, and the part; None where it is no part that is known."""
    for part, pattern in _PARTS.items():
        if match := pattern.search(key):
            return key[: match.start()], part
    return key, None


def component_of(key: str) -> tuple[str, str]:
    """Return the component that a name belongs to, and the name in it; a name of the transformer keeps its prefixes."""
    rest = _WRAPPERS.sub("", key)
    while True:
        for pattern, component in _COMPONENTS.items():
            if match := pattern.match(rest):
                return component, rest[match.end() :]
        prefix = _PREFIX.match(rest)
        if prefix is None:
            return "transformer", key
        rest = rest[prefix.end() :]


def refuse_other_kinds(keys: Iterable[str], source: str) -> None:
    """Refuse adapters that are not up @ down.

    Raises:
        CheckpointError: LoKr, LoHa, DoRA and the like; it names the kind.
    """
    for key in keys:
        for kind, pattern in _OTHER_KINDS.items():
            if pattern.search(key):
                raise CheckpointError(
                    f"{source} holds a {kind} adapter ({key}), which is no product of two matrices per layer; only plain "
                    "LoRA is supported: convert it, or merge it into the checkpoint with the tool that trained it"
                )


def _table_spellings(layer: str) -> list[str]:
    return [f"{layer}{dot}{table}" for table in _TABLES for dot in (("." if layer else ""), "_")]


def _row_order(name: str) -> int:
    match = _ROWS.search(name)
    return match.lastindex or 0 if match else 0
