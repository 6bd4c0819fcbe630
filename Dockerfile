# The price service on a CPU. The saved model is mounted, not copied into the image:
#
#   python -m pricing.export --model OUT --to exported
#   docker build -t product-price .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/exported:/model:ro" -v price-jobs:/jobs product-price
FROM python:3.11-slim

# LightGBM needs the OpenMP library, which this image lacks. Debian keeps only one version of it, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# From this index, torch comes without the CUDA libraries, which take several GB. The versions are those of all others.
COPY requirements.txt ./
RUN grep -E '^torch(vision)?==' requirements.txt > torch.txt \
    && pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu -r torch.txt \
    && pip install --no-cache-dir -r requirements.txt \
    && rm torch.txt

COPY . ./

RUN useradd --uid 10001 --create-home price \
    && mkdir /jobs /model \
    && chown price /jobs
USER 10001

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    OMP_WAIT_POLICY=PASSIVE

EXPOSE 8000
# The first answer comes after the models are loaded. The image has no curl.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]

# Inside the container the service listens on every address; -p decides who reaches it.
ENTRYPOINT ["python", "-m", "serving.api", "--host", "0.0.0.0", "--port", "8000", "--jobs", "/jobs", "--device", "cpu"]
CMD ["--model", "/model"]
