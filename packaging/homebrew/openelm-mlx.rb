# Untested: only its syntax has been checked, as it was written without a Mac and before the first release.
#
# For a release, write its VERSION and the sha256 of its source distribution below, then let Homebrew write one
# `resource` block for each dependency on the package index:
#
#     brew update-python-resources --print-only openelm-mlx
#
# MLX, NumPy, protobuf and SentencePiece are compiled code that Homebrew has formulas for; they are not resources.
class OpenelmMlx < Formula
  include Language::Python::Virtualenv

  desc "Chat with, convert, evaluate and measure Apple's OpenELM language models on MLX"
  homepage "https://pypi.org/project/openelm-mlx/"
  url "https://files.pythonhosted.org/packages/source/o/openelm-mlx/openelm_mlx-VERSION.tar.gz"
  sha256 "0000000000000000000000000000000000000000000000000000000000000000"
  license "MIT"

  depends_on "pkgconf" => :build
  depends_on "rust" => :build # for hf-xet, pydantic-core, safetensors and tokenizers
  depends_on "certifi" => :no_linkage
  depends_on "libyaml"
  depends_on macos: :ventura
  depends_on "mlx"
  depends_on "numpy"
  depends_on "protobuf"
  depends_on "python@3.14"
  depends_on "sentencepiece"

  pypi_packages exclude_packages: %w[certifi mlx mlx-metal numpy protobuf sentencepiece]

  def install
    virtualenv_install_with_resources
    generate_completions_from_executable(bin/"openelm", "completion")
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/openelm-mlx --version")
    system bin/"openelm", "generate", "Once upon a time", "--max-tokens", "4"
  end
end
