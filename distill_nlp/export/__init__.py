"""A finished classifier as an ONNX folder: in float32, float16 or int8, and compared with its original."""

from importlib.util import find_spec

from distill_nlp.errors import UsageError

if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
    raise UsageError(f"an export needs {' and '.join(missing)}: pip install 'distill-nlp[export]'")

from distill_nlp.export.build import export_model
from distill_nlp.export.render import terminal_table
from distill_nlp.export.settings import ExportSettings

__all__ = ["ExportSettings", "export_model", "terminal_table"]
