"""What tests, benchmarks and scripts share: server processes, links, rogue servers, small bundles and networks."""
